//! The example `schedules` as its user meets it.

use std::path::Path;
use std::process::{Command, Output};

fn schedules(flags: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    // The example beside this test. A plain `cargo test` builds it; with `--test cli` alone, build it first.
    let example = test.parent().and_then(Path::parent).unwrap().join("examples").join("schedules");
    Command::new(&example)
        .args(flags)
        .output()
        .unwrap_or_else(|why| panic!("{}: {why}; `cargo build --example schedules` makes it", example.display()))
}

#[track_caller]
fn printed(flags: &[&str]) -> String {
    let output = schedules(flags);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn draws_the_grid_and_says_what_it_costs() {
    let text = printed(&["--schedule", "1f1b", "-p", "2", "-m", "4"]);
    let expected = "\
rank 0 | 0F0 0F1 .   .   0B0 --- 0F2 0B1 --- 0F3 0B2 --- .   0B3 ---
rank 1 | .   1F0 1B0 --- 1F1 1B1 --- 1F2 1B2 --- 1F3 1B3 --- .   .

time               15
idle share         0.200
live activations   2 1 by stage, 2 1 by rank
";
    assert_eq!(text, expected);
}

#[test]
fn takes_any_numbers_and_costs() {
    for (flags, idle) in [
        (vec!["--schedule", "gpipe", "-p", "8", "-m", "32"], "0.179"),
        (vec!["--schedule", "interleaved", "-p", "4", "-m", "16"], "0.086"),
        (vec!["--schedule", "interleaved", "-p", "4", "-m", "8", "-v", "3"], "0.111"),
        (vec!["--schedule", "zb_h1", "-p", "4", "-m", "8"], "0.111"),
        (vec!["--schedule", "forward_only", "-p", "2", "-m", "4"], "0.200"),
        (vec!["--schedule", "gpipe", "-p", "2", "-m", "1", "--forward", "2,4", "--communication", "0.5"], "0.545"),
    ] {
        let text = printed(&flags);
        assert!(text.contains(&format!("idle share         {idle}\n")), "{flags:?}\n{text}");
    }
}

/// Far beyond what anybody runs, and still drawn while one waits.
#[test]
fn large_pipelines_are_drawn() {
    let text = printed(&["--schedule", "interleaved", "-p", "64", "-m", "512", "-v", "4"]);
    let idle = 63.0 / 4.0 / (512.0 + 63.0 / 4.0);
    assert!(text.contains(&format!("idle share         {idle:.3}\n")));
    assert_eq!(text.lines().filter(|line| line.starts_with("rank ")).count(), 64);
}

#[test]
fn draws_a_picture_and_writes_a_timetable_that_it_reads_again() {
    let folder = std::env::temp_dir().join(format!("schedules-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (svg, csv) = (folder.join("zb.svg"), folder.join("zb.csv"));
    let flags = ["--schedule", "zb_h1", "-p", "3", "-m", "5", "--actions", "--svg", svg.to_str().unwrap()];
    let text = printed(&flags);
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    // Every action is there, and so is every rank.
    for action in ["0F0", "2I4", "2W4", "rank 2", "idle share 0.118, time 17"] {
        assert!(picture.contains(action), "{action}\n{picture}");
    }
    let timetable = text.splitn(3, "\n\n").nth(2).unwrap();
    std::fs::write(&csv, timetable).unwrap();
    let again = printed(&["--timetable", csv.to_str().unwrap(), "--actions"]);
    assert_eq!(again, text);
    std::fs::write(&csv, "0F0,0B0\n1B0,1F0\n").unwrap();
    let wrong = schedules(&["--timetable", csv.to_str().unwrap()]);
    assert_eq!(wrong.status.code(), Some(1));
    let message = String::from_utf8(wrong.stderr).unwrap();
    assert!(message.contains("1B0 on rank 1 is wrong") && message.contains(">1B0<"), "{message}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn bad_flags_are_one_line_and_status_2() {
    for (flags, reason) in [
        (vec!["-p", "0"], "it must be a whole number from 1 to 256"),
        (vec!["-m", "many"], "it must be a whole number from 1 to 4096"),
        (vec!["--schedule", "fastest"], "invalid value 'fastest'"),
        (vec!["--schedule", "gpipe", "-v", "2"], "--stages-per-rank 2 is for --schedule interleaved or forward_only"),
        (vec!["--forward", "1,2,3"], "--forward has 3 times, and there are 4 stages; give 1 or 4"),
        (vec!["--communication", "-1"], "-1"),
        (vec!["--forward", "NaN"], "it must be a number that is not negative"),
        (vec!["--timetable", "/does/not/exist"], "/does/not/exist: "),
        (vec!["--timetable", "x", "-p", "2"], "cannot be used with"),
        (vec!["--schedule", "interleaved", "-p", "256", "-m", "4096", "-v", "64"], "ask for fewer micro-batches"),
        (vec!["--colour"], "--colour"),
    ] {
        let output = schedules(&flags);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {message}");
        assert_eq!(message.lines().count(), 1, "{flags:?}: {message}");
        assert!(message.starts_with("schedules: ") && message.contains(reason), "{flags:?}: {message}");
    }
}

/// The page shows commands and what they print, as blocks that begin with `$ schedules`.
#[test]
fn the_documentation_shows_what_is_printed() {
    let page = include_str!("../../docs/pipeline-parallel.md");
    let blocks: Vec<&str> = page.split("```text\n$ schedules ").skip(1).collect();
    assert!(blocks.len() >= 5);
    for block in blocks {
        let (flags, rest) = block.split_once('\n').unwrap();
        let (shown, _) = rest.split_once("\n```").unwrap();
        assert_eq!(printed(&flags.split(' ').collect::<Vec<_>>()).trim_end(), shown, "schedules {flags}");
    }
    for (p, m) in [(2, 4), (2, 8), (4, 8), (4, 16), (8, 32)] {
        let share = |schedule: &str| {
            let text = printed(&["--schedule", schedule, "-p", &p.to_string(), "-m", &m.to_string()]);
            let line = text.lines().find(|line| line.starts_with("idle share")).unwrap();
            line.rsplit(' ').next().unwrap().to_owned()
        };
        let shares = ["gpipe", "1f1b", "interleaved", "zb_h1"].map(share);
        let row = format!("| {p} | {m} | {} |\n", shares.join(" | "));
        assert!(page.contains(&row), "{row}");
    }
}
