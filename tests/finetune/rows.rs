//! Documents in rows, rows in batches.

use std::collections::HashSet;
use std::fmt::Write as _;

use burn::tensor::Device;

use crate::data::document::Document;
use crate::data::packing::{Packing, Part, parts};
use crate::data::row::{Row, batch};
use crate::data::set::{BatchSize, DataSet, Left};
use crate::data::source::Source;
use crate::directory::{CHATML, Directory};

/// Texts of 0 to 70 letters, so that some are longer than a row.
fn texts(count: usize) -> String {
    let mut lines = String::new();
    for number in 0..count {
        let letters: String = (0..number * 37 % 71).map(|at| char::from(b'a' + ((number + at) % 26) as u8)).collect();
        writeln!(lines, r#"{{"text": "{letters}"}}"#).unwrap();
    }
    lines
}

fn set(directory: &Directory, lines: &str, seq: usize, packed: bool) -> DataSet {
    let file = directory.write("data.jsonl", lines.as_bytes());
    DataSet::open(&file, seq, packed, 3, directory.reading()).unwrap()
}

/// The documents of a row, each as (token, target, weight, position) of all its tokens, sorted.
fn documents(rows: impl IntoIterator<Item = Row>) -> Vec<Vec<(i64, i64, bool, i64)>> {
    let mut all = Vec::new();
    for row in rows {
        let numbers: HashSet<i64> = row.documents[..row.filled].iter().copied().collect();
        for number in numbers {
            let places = (0..row.filled).filter(|at| row.documents[*at] == number);
            all.push(
                places.map(|at| (row.tokens[at], row.targets[at], row.weights[at] == 1.0, row.positions[at])).collect(),
            );
        }
    }
    all.sort();
    all
}

fn every_row(set: &DataSet) -> impl Iterator<Item = Row> {
    (0..set.rows()).map(|row| set.row(row).unwrap())
}

#[test]
fn packed_rows_have_what_rows_of_one_document_have() {
    let directory = Directory::new(&[]);
    let lines = texts(60);
    let (packed, alone) = (set(&directory, &lines, 32, true), set(&directory, &lines, 32, false));
    assert_eq!(documents(every_row(&packed)), documents(every_row(&alone)));
    assert_eq!((packed.tokens(), packed.documents()), (alone.tokens(), 60));
    // Nearly as few rows as there can be.
    let least = packed.tokens().div_ceil(32);
    assert!(packed.rows() <= least + least / 10 + 1 && packed.rows() < alone.rows(), "{} {least}", packed.rows());
}

/// The pairs of a document are those of its text: none reaches over its end, and each is there once.
#[test]
fn each_token_but_the_last_has_its_successor_as_target_once() {
    let directory = Directory::new(&[]);
    let set = set(&directory, &texts(40), 16, true);
    let mut found: Vec<(i64, i64)> = documents(every_row(&set)).concat().iter().map(|(a, b, ..)| (*a, *b)).collect();
    found.sort_unstable();
    let mut expected = Vec::new();
    for line in texts(40).lines() {
        let text = &line[10..line.len() - 2];
        let tokens: Vec<i64> = text.bytes().map(|byte| i64::from(byte) + 3).chain([2]).collect();
        expected.extend(tokens.windows(2).map(|pair| (pair[0], pair[1])));
    }
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[test]
fn positions_start_anew_and_padding_is_a_document_without_weight() {
    let directory = Directory::new(&[]);
    let set = set(&directory, "{\"text\": \"abc\"}\n\n{\"text\": \"de\"}\n", 8, true);
    assert_eq!(set.rows(), 1);
    let row = set.row(0).unwrap();
    assert_eq!(row.filled, 5);
    let (first, second) = if row.tokens[0] == 100 { (3, 2) } else { (2, 3) };
    let places = |length: i64| 0..length;
    let positions: Vec<i64> = places(first).chain(places(second)).chain(places(3)).collect();
    assert_eq!(row.positions, positions);
    let numbers = [vec![0; first as usize], vec![1; second as usize], vec![2; 3]].concat();
    assert_eq!(row.documents, numbers);
    assert_eq!(row.weights, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
    let tensors = batch(&[row, Row::empty(8)], &Device::flex());
    assert_eq!([tensors.tokens.dims(), tensors.targets.dims(), tensors.positions.dims()], [[2, 8]; 3]);
    assert_eq!(tensors.weights.sum().into_scalar::<f32>(), 5.0);
    assert_eq!(tensors.documents.sum().into_scalar::<i64>(), numbers.iter().sum::<i64>());
}

#[test]
fn packing_fills_rows_and_keeps_parts_whole() {
    for seq in [1, 7, 64] {
        let lengths = (0..500u32).map(|number| number * 7919 % 90);
        let all: Vec<Part> = lengths.enumerate().flat_map(|(at, tokens)| parts(at as u32, tokens, true, seq)).collect();
        let packing = Packing::packed(all.clone(), seq);
        let rows: Vec<&[Part]> = (0..packing.rows()).map(|row| packing.row(row)).collect();
        assert!(rows.iter().all(|row| row.iter().map(|part| part.length).sum::<u32>() <= seq && !row.is_empty()));
        let order = |mut all: Vec<Part>| {
            all.sort_by_key(|part| (part.document, part.start));
            all
        };
        assert_eq!(order(rows.concat()), order(all));
    }
    // A document that fits, one that is one token too long, one that is cut off.
    let lengths = |tokens, divisible| parts(0, tokens, divisible, 8).map(|part| part.length).collect::<Vec<_>>();
    assert_eq!(
        [lengths(9, true), lengths(10, true), lengths(10, false), lengths(1, true), lengths(0, true)],
        [vec![8], vec![8, 1], vec![8], vec![], vec![]]
    );
}

#[test]
fn conversations_are_cut_off_and_left_out_where_nothing_is_trained_on() {
    let directory = Directory::new(&[]);
    let asked = |prompt: usize, completion: usize| {
        format!("{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n", "q".repeat(prompt), "a".repeat(completion))
    };
    // The first target of a prompt of 16 would be that of the 16th token, which the row of 16 has; of 17 no more.
    let set = set(&directory, &(asked(3, 4) + &asked(16, 5) + &asked(17, 5)), 16, false);
    assert_eq!((set.rows(), set.left()), (2, Left { cut: 1, dropped: 1 }));
    let weights: HashSet<usize> = every_row(&set).map(|row| row.weights.iter().sum::<f32>() as usize).collect();
    assert_eq!(weights, HashSet::from([5, 1]));
    let file = directory.write("none.jsonl", asked(40, 1).as_bytes());
    let problem = DataSet::open(&file, 16, true, 0, directory.reading()).err().unwrap();
    assert!(problem.contains("none.jsonl: there is nothing to train on in the first 16 tokens"), "{problem}");
}

#[test]
fn an_epoch_has_every_row_once_in_an_order_of_its_own() {
    let directory = Directory::new(&[]);
    let set = set(&directory, &texts(50), 16, true);
    let rows = set.rows();
    let epoch = |number: u64| (number * rows..(number + 1) * rows).map(|row| set.row(row).unwrap()).collect::<Vec<_>>();
    let (first, second) = (epoch(0), epoch(1));
    assert_ne!(first, second);
    assert_eq!(documents(first.clone()), documents(second));
    // Asked in another order, or of another run, it is the same.
    assert_eq!(first, epoch(0));
    let again = DataSet::open(&directory.path().join("data.jsonl"), 16, true, 3, directory.reading()).unwrap();
    assert_eq!((again.row(rows + 1).unwrap(), again.fingerprint()), (set.row(rows + 1).unwrap(), set.fingerprint()));
    let other = DataSet::open(&directory.path().join("data.jsonl"), 16, true, 4, directory.reading()).unwrap();
    assert_ne!(other.fingerprint(), set.fingerprint());
}

#[test]
fn batches_take_all_rows_in_order_whoever_takes_them() {
    let directory = Directory::new(&[]);
    let set = set(&directory, &texts(50), 16, true);
    let end = 2 * set.rows();
    for size in
        [BatchSize::Rows(5), BatchSize::Tokens { most: 80, replicas: 3 }, BatchSize::Tokens { most: 1, replicas: 3 }]
    {
        let (mut from, mut count, mut all) = (0, 0, Vec::new());
        while from < end {
            let rows = set.batch(from, end, size);
            let shares: Vec<Vec<Vec<Row>>> =
                (0..3).map(|replica| set.share(rows.clone(), replica, 3, 2).unwrap()).collect();
            // Nothing that is taken in turns can end earlier on one replica than on another, and all shapes are one.
            assert!(shares.iter().all(|chunks| !chunks.is_empty() && chunks.iter().all(|chunk| chunk.len() == 2)));
            let taken: Vec<Row> = shares.into_iter().flatten().flatten().filter(|row| row.filled > 0).collect();
            let tokens: usize = taken.iter().map(|row| row.filled).sum();
            match size {
                BatchSize::Rows(most) => assert_eq!(taken.len(), most.min((end - from) as usize)),
                BatchSize::Tokens { most, replicas } => {
                    assert!(tokens <= most || taken.len() <= replicas);
                    // One row more would be too much.
                    let next = if rows.end < end { set.row(rows.end).unwrap().filled } else { most };
                    assert!(tokens + next > most, "{tokens} {next}");
                }
            }
            all.extend(taken);
            (from, count) = (rows.end, count + 1);
        }
        assert_eq!(count, set.batches(0, end, size));
        assert_eq!(all, (0..end).map(|row| set.row(row).unwrap()).collect::<Vec<_>>());
    }
}

#[test]
fn a_plain_text_is_one_document_in_blocks_of_lines() {
    let directory = Directory::new(&[]);
    let text: String = (0..1000).map(|line| format!("Line {line}, é.\n")).collect();
    let file = directory.write("book.txt", text.as_bytes());
    let set = DataSet::open(&file, 128, true, 0, directory.reading()).unwrap();
    // Of 16 bytes for each token of a row, and what is left of the last line.
    assert!((text.len() / (16 * 128 + 20)..=text.len().div_ceil(16 * 128)).contains(&set.documents()));
    // All of it but the first token of each block is a target, and the end once.
    let targets: Vec<i64> = every_row(&set).flat_map(|row| row.targets[..row.filled].to_vec()).collect();
    assert_eq!(targets.len(), text.len() + 1 - set.documents());
    assert_eq!(targets.iter().filter(|token| **token == 2).count(), 1);
    // Blocks are whole lines, so every line but those at the ends of rows can be read in one.
    assert!(set.shown(0).unwrap().concat().contains(", é.\nLine "));
}

#[test]
fn what_is_trained_on_is_shown() {
    let directory = Directory::new(&[]).with_template(CHATML);
    let line = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}"#;
    let set = set(&directory, &format!("{line}\n"), 128, true);
    let shown = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>\n⟧";
    assert_eq!(set.shown(0).unwrap(), [shown]);
}

#[test]
fn a_bad_line_is_named_with_its_number() {
    let directory = Directory::new(&[]);
    let good = "{\"text\": \"a\"}\n";
    for (name, bytes, why) in [
        ("a.jsonl", format!("{good}\n{good}{{\"text\"\n{good}").into_bytes(), "a.jsonl:4: is not JSON"),
        ("b.jsonl", [good.as_bytes(), b"{\"text\": \"\xff\"}"].concat(), "b.jsonl:2: is not UTF-8: its byte 11 is"),
        ("c.txt", b"a\nb\n\xff".to_vec(), "c.txt:3: is not UTF-8: its byte 1 is"),
        (
            "g.jsonl",
            b"{\"text\": \"a\"}\r\n\r\n{\"text\": \r\n".to_vec(),
            "g.jsonl:3: is not JSON: EOF while parsing a value, column 8",
        ),
        ("h.jsonl", b"\xef\xbb\xbf{\"text\": 1}".to_vec(), "h.jsonl:1: `text` is not a text"),
        ("i.jsonl", b"\xff\xfe{\0\"\0".to_vec(), "i.jsonl:1: is UTF-16: save the file as UTF-8"),
        ("j.txt", b"\xfe\xff\0a".to_vec(), "j.txt:1: is UTF-16: save the file as UTF-8"),
        // The first of several, whoever finds which.
        ("k.jsonl", "{}\n".repeat(200).into_bytes(), "k.jsonl:1: has no `text`"),
        ("d.jsonl", b"\n \n".to_vec(), "d.jsonl: has no documents"),
        ("e.txt", Vec::new(), "e.txt: has no documents"),
        ("f.json", b"[]".to_vec(), "f.json: a .json file: give JSON Lines"),
    ] {
        let file = directory.write(name, &bytes);
        let problem = DataSet::open(&file, 8, true, 0, directory.reading()).err().unwrap();
        assert!(problem.contains(why) && problem.lines().count() == 1, "{problem}");
    }
    for path in [directory.path().join("nowhere.jsonl"), directory.path().to_owned()] {
        assert!(DataSet::open(&path, 8, true, 0, directory.reading()).is_err());
    }
}

/// What other systems write around lines is no part of them.
#[test]
fn marks_line_ends_and_empty_lines_change_nothing() {
    let directory = Directory::new(&[]);
    let lines = "{\"text\": \"one\\r\\ntwo\"}\n{\"text\": \"three\"}\n";
    let text = "First, é.\n\nSecond.\n";
    let rows = |name: &str, bytes: &[u8]| {
        let set = DataSet::open(&directory.write(name, bytes), 64, true, 0, directory.reading()).unwrap();
        every_row(&set).collect::<Vec<_>>()
    };
    let mark = |text: &str| [b"\xef\xbb\xbf", text.as_bytes()].concat();
    for (name, plain) in [("a.jsonl", lines), ("a.txt", text)] {
        let expected = rows(name, plain.as_bytes());
        assert_eq!(rows(name, &mark(plain)), expected, "{name}");
        let windows = plain.replace('\n', "\r\n");
        assert_eq!(rows(name, windows.as_bytes()), expected, "{name}");
        assert_eq!(rows(name, &mark(&windows)), expected, "{name}");
    }
    let empty = lines.replace('\n', "\n \n\n");
    assert_eq!(rows("a.jsonl", empty.as_bytes()), rows("a.jsonl", lines.as_bytes()));
}

/// A line is read whole; of a plain text it need not be.
#[test]
fn a_line_that_is_too_long_is_refused_or_divided() {
    let directory = Directory::new(&[]);
    let file = directory.write("long.jsonl", b"{\"text\": \"a\"}\n{");
    std::fs::OpenOptions::new().append(true).open(&file).unwrap().set_len((64 << 20) + 100).unwrap();
    let problem = DataSet::open(&file, 8, true, 0, directory.reading()).err().unwrap();
    assert!(problem.ends_with("long.jsonl:2: has more than 67108864 bytes: a line is one document"), "{problem}");

    let line = |word: &str, count: usize| word.repeat(count) + "\nthe end.";
    for (text, begins) in [(line("words, é ", 20_000), "\u{20}"), (line("é", 70_000), "é")] {
        let text = format!("A beginning.\n{text}");
        let (file, reading) = (directory.write("long.txt", text.as_bytes()), directory.reading());
        let source = Source::open(&file, 1024, &reading).unwrap();
        let blocks: Vec<Document> =
            (0..source.places().len()).map(|number| source.document(number, &reading).unwrap()).collect();
        // Not one, nor many, and all of it.
        assert!((3..=5).contains(&blocks.len()), "{}", blocks.len());
        let tokens: Vec<u32> = blocks.iter().flat_map(|block| block.tokens.clone()).collect();
        let bytes: Vec<u8> = tokens[..tokens.len() - 1].iter().map(|token| (token - 3) as u8).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
        // Words are whole, and characters.
        let first = blocks[1].tokens[0] - 3;
        assert_eq!(first as u8, begins.as_bytes()[0]);
    }
    // What is wrong behind it has the number of its line.
    let bytes = [b"a\n", "word ".repeat(30_000).as_bytes(), b"\n\xff"].concat();
    let problem = DataSet::open(&directory.write("bad.txt", &bytes), 64, true, 0, directory.reading()).err().unwrap();
    assert!(problem.contains("bad.txt:3: is not UTF-8: its byte 1 is"), "{problem}");
}

#[test]
fn a_file_that_changes_during_the_training_is_an_error() {
    let directory = Directory::new(&[]);
    let set = set(&directory, &texts(3), 64, true);
    directory.write("data.jsonl", texts(4).replacen("l", "\\n", 40).as_bytes());
    let problem = (0..set.rows()).find_map(|row| set.row(row).err()).unwrap();
    assert!(problem.contains("data.jsonl:") && problem.lines().count() == 1, "{problem}");
}
