//! Every collective against a plain reference, for every dtype, odd shapes and layouts, and several groups at once.
//!
//! Every rank can compute what every other rank brings, so each checks its own results.

use std::fmt::Debug;
use std::time::Duration;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::kind::Basic;
use burn::tensor::{Bool, DType, Device, Float, Int, Tensor, TensorData, bf16, f16};
use burn_parallel::Error;
use burn_parallel::comm::{Communicator, Counters, Element, ReduceOp, TensorKind, part};
use burn_parallel::launch::{self, Rank};
use proptest::prelude::*;

const SIZES: [usize; 5] = [1, 2, 3, 4, 8];

/// An element type with a reference implementation of the reductions.
trait Item: Element + PartialEq + Debug {
    /// The kind of tensor that holds it.
    type Kind: TensorKind + Basic;

    /// A number of no particular meaning, now and then a special one.
    fn any(seed: u64) -> Self;

    /// Bit pattern.
    fn bits(self) -> u64;

    /// The fold in rank order; `None` if the reduction has no meaning.
    fn fold(op: ReduceOp, values: &[Self]) -> Option<Self>;

    /// Equal, or both NaN.
    fn same(self, other: Self) -> bool {
        #[allow(clippy::eq_op, reason = "NaN")]
        let nan = |x: Self| x != x;
        self == other || (nan(self) && nan(other))
    }
}

/// The factor that a rank brings to [`ReduceOp::PreMulSum`].
fn factor(rank: usize) -> f64 {
    [0.5, -1.25, 3.0, 0.1, 1.0, 0.0, 7.5, -0.3][rank]
}

/// The op as a rank calls it.
fn of_rank(op: ReduceOp, rank: usize) -> ReduceOp {
    if let ReduceOp::PreMulSum(_) = op { ReduceOp::PreMulSum(factor(rank)) } else { op }
}

const OPS: [ReduceOp; 6] =
    [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max, ReduceOp::Min, ReduceOp::Product, ReduceOp::PreMulSum(f64::NAN)];

macro_rules! fold_floats {
    ($op:expr, $values:expr, $T:ty) => {{
        let values: Vec<$T> = $values;
        let max = |a: $T, b: $T| if a.is_nan() || b.is_nan() { <$T>::NAN } else { a.max(b) };
        let min = |a: $T, b: $T| if a.is_nan() || b.is_nan() { <$T>::NAN } else { a.min(b) };
        let scaled = values.iter().enumerate().map(|(rank, x)| x * factor(rank) as $T);
        let n = values.len() as $T;
        let values = values.iter().copied();
        match $op {
            ReduceOp::Sum => values.reduce(|a, b| a + b),
            ReduceOp::Mean => values.reduce(|a, b| a + b).map(|sum| sum / n),
            ReduceOp::Max => values.reduce(max),
            ReduceOp::Min => values.reduce(min),
            ReduceOp::Product => values.reduce(|a, b| a * b),
            ReduceOp::PreMulSum(_) => scaled.reduce(|a, b| a + b),
        }
    }};
}

fn any_float(seed: u64) -> f64 {
    match seed % 41 {
        0 => f64::NAN,
        1 => f64::INFINITY,
        2 => -0.0,
        _ => (seed % 20011) as f64 / 97.0 - 100.0,
    }
}

macro_rules! items {
    (floats $($F:ident),*; halves $($H:ident),*; integers $($I:ident),*) => {
        $(impl Item for $F {
            type Kind = Float;
            fn any(seed: u64) -> Self { any_float(seed) as $F }
            fn bits(self) -> u64 { self.to_bits().into() }
            fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> { fold_floats!(op, values.to_vec(), $F) }
        })*
        $(impl Item for $H {
            type Kind = Float;
            fn any(seed: u64) -> Self { $H::from_f64(any_float(seed)) }
            fn bits(self) -> u64 { self.to_bits().into() }
            // In f32, rounded once.
            fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> {
                fold_floats!(op, values.iter().map(|x| x.to_f32()).collect(), f32).map($H::from_f32)
            }
        })*
        $(impl Item for $I {
            type Kind = Int;
            fn any(seed: u64) -> Self { if seed % 3 == 0 { seed as $I } else { (seed % 5) as $I } }
            fn bits(self) -> u64 { self as u64 }
            fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> {
                let values = values.iter().copied();
                match op {
                    ReduceOp::Sum => values.reduce($I::wrapping_add),
                    ReduceOp::Max => values.max(),
                    ReduceOp::Min => values.min(),
                    ReduceOp::Product => values.reduce($I::wrapping_mul),
                    ReduceOp::Mean | ReduceOp::PreMulSum(_) => None,
                }
            }
        })*
    };
}
items!(floats f64, f32; halves f16, bf16; integers i64, i32, i16, i8, u64, u32, u16, u8);

impl Item for bool {
    type Kind = Bool;

    fn any(seed: u64) -> Self {
        seed.is_multiple_of(2)
    }

    fn bits(self) -> u64 {
        self.into()
    }

    fn fold(op: ReduceOp, values: &[Self]) -> Option<Self> {
        match op {
            ReduceOp::Max => Some(values.contains(&true)),
            ReduceOp::Min => Some(!values.contains(&false)),
            _ => None,
        }
    }
}

/// Calls a generic function for every element type.
macro_rules! for_every_item {
    ($f:ident ( $($argument:expr),* )) => {{
        $f::<f64>($($argument),*)?; $f::<f32>($($argument),*)?; $f::<f16>($($argument),*)?; $f::<bf16>($($argument),*)?;
        $f::<i64>($($argument),*)?; $f::<i32>($($argument),*)?; $f::<i16>($($argument),*)?; $f::<i8>($($argument),*)?;
        $f::<u64>($($argument),*)?; $f::<u32>($($argument),*)?; $f::<u16>($($argument),*)?; $f::<u8>($($argument),*)?;
        $f::<bool>($($argument),*)?;
    }};
}

/// A number that depends on all of these (splitmix64).
fn mix(seed: u64, rank: usize, place: usize) -> u64 {
    let mut x =
        seed ^ (rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (place as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    for factor in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = (x ^ (x >> 30)).wrapping_mul(factor);
    }
    x ^ (x >> 31)
}

/// What `rank` brings.
fn input<E: Item>(seed: u64, rank: usize, len: usize) -> Vec<E> {
    (0..len).map(|place| E::any(mix(seed, rank, place))).collect()
}

/// The reduction over the ranks; `None` if it has no meaning.
fn reduced<E: Item>(seed: u64, size: usize, len: usize, op: ReduceOp) -> Option<Vec<E>> {
    let inputs: Vec<Vec<E>> = (0..size).map(|rank| input(seed, rank, len)).collect();
    E::fold(op, &[E::default()])?;
    let at = |place| E::fold(op, &inputs.iter().map(|input| input[place]).collect::<Vec<_>>());
    (0..len).map(at).collect()
}

#[track_caller]
fn equal<E: Item>(found: &[E], expected: &[E], what: impl Debug) {
    let same = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| a.same(*b));
    assert!(same, "{what:?} of {:?}: {found:?} instead of {expected:?}", E::DTYPE);
}

#[track_caller]
fn refused<R: Debug>(result: Result<R, Error>, refused_op: ReduceOp, refused_dtype: DType) {
    match result {
        Err(Error::UnsupportedReduction { op, dtype, .. }) => {
            assert_eq!((format!("{op:?}"), dtype), (format!("{refused_op:?}"), refused_dtype));
        }
        other => panic!("{refused_op:?} of {refused_dtype:?} gave {other:?}"),
    }
}

/// Every collective on vectors. Adds the bits of what all ranks must have alike to `alike`.
fn vectors<E: Item>(comm: &Communicator, seed: u64, len: usize, alike: &mut Vec<u64>) -> Result<(), Error> {
    let (rank, size) = (comm.rank(), comm.size());
    let mine = || input::<E>(seed, rank, len);
    let root = seed as usize % size;
    for op in OPS {
        let my_op = of_rank(op, rank);
        let Some(expected) = reduced::<E>(seed, size, len, op) else {
            refused(comm.all_reduce(mine(), my_op), my_op, E::DTYPE);
            refused(comm.all_reduce_in_place(&mut mine(), my_op), my_op, E::DTYPE);
            refused(comm.all_reduce_coalesced(vec![mine(), mine()], my_op), my_op, E::DTYPE);
            refused(comm.reduce_scatter(mine(), my_op), my_op, E::DTYPE);
            refused(comm.reduce(mine(), my_op, root), my_op, E::DTYPE);
            continue;
        };
        let result = comm.all_reduce(mine(), my_op)?;
        equal(&result, &expected, op);
        alike.extend(result.iter().map(|x| x.bits()));

        let mut slice = mine();
        comm.all_reduce_in_place(&mut slice, my_op)?;
        assert!(slice.iter().zip(&result).all(|(a, b)| a.bits() == b.bits()));

        let (first, rest) = mine().split_at(len / 3).clone_parts();
        let (second, third) = rest.split_at(rest.len() / 5).clone_parts();
        let pieces = comm.all_reduce_coalesced(vec![first, second, vec![], third], my_op)?;
        assert_eq!(pieces.len(), 4);
        // Not by its bits: the sign of a NaN may depend on where in a vector register it was made.
        equal(&pieces.concat(), &result, op);

        equal(&comm.reduce_scatter(mine(), my_op)?, &expected[part(len, size, rank)], op);
        match comm.reduce(mine(), my_op, root)? {
            Some(result) => equal(&result, &expected, op),
            None => assert_ne!(rank, root),
        }
    }
    equal(&comm.broadcast(mine(), root)?, &input::<E>(seed, root, len), "broadcast");
    let mut slice = mine();
    comm.broadcast_in_place(&mut slice, root)?;
    equal(&slice, &input::<E>(seed, root, len), "broadcast_in_place");

    // Unequal lengths, some 0.
    let length = |rank: usize| (mix(seed, rank, 1 << 40) % 8) as usize * len / 7;
    let all: Vec<E> = (0..size).flat_map(|rank| input::<E>(seed, rank, length(rank))).collect();
    let ragged = || input::<E>(seed, rank, length(rank));
    equal(&comm.all_gather(ragged())?, &all, "all_gather");
    let mut output = vec![E::default(); all.len()];
    comm.all_gather_into(&ragged(), &mut output)?;
    equal(&output, &all, "all_gather_into");
    match comm.gather(ragged(), root)? {
        Some(result) => equal(&result, &all, "gather"),
        None => assert_ne!(rank, root),
    }
    let exchanged: Vec<E> = (0..size)
        .flat_map(|from| input::<E>(seed, from, length(from))[part(length(from), size, rank)].to_vec())
        .collect();
    equal(&comm.all_to_all(ragged())?, &exchanged, "all_to_all");
    let whole = input::<E>(seed, root, len);
    // What others than the root bring to a scatter does not matter.
    let brought = (rank == root || seed.is_multiple_of(2)).then(mine);
    equal(&comm.scatter(brought, root)?, &whole[part(len, size, rank)], "scatter");

    // Round the ring, tags in the wrong order, also to oneself.
    let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
    for tag in 0..3 {
        comm.send(input::<E>(seed + tag, rank, len), next, tag)?;
    }
    comm.send(input::<E>(seed + 9, rank, len), next, 2)?;
    for (tag, expected) in [(2, 2), (0, 0), (2, 9), (1, 1)] {
        equal(&comm.recv::<Vec<E>>(previous, tag)?, &input(seed + expected, previous, len), tag);
    }
    Ok(())
}

trait CloneParts<E> {
    fn clone_parts(self) -> (Vec<E>, Vec<E>);
}

impl<E: Clone> CloneParts<E> for (&[E], &[E]) {
    fn clone_parts(self) -> (Vec<E>, Vec<E>) {
        (self.0.to_vec(), self.1.to_vec())
    }
}

/// How a tensor lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Plain,
    /// Another handle holds the same memory.
    Shared,
    /// First and last dim lie the other way round.
    Strided,
    /// In the middle of something larger.
    Sliced,
    /// Sliced out of the columns of something larger.
    Columns,
    Autodiff,
}

const FORMS: [Form; 6] = [Form::Plain, Form::Shared, Form::Strided, Form::Sliced, Form::Columns, Form::Autodiff];

fn plain<const D: usize, E: Item>(data: Vec<E>, dims: [usize; D], device: &Device) -> Tensor<D, E::Kind> {
    Tensor::from_data(TensorData::new(data, dims), (device, E::DTYPE))
}

fn values<const D: usize, E: Item>(tensor: &Tensor<D, E::Kind>) -> Vec<E> {
    assert_eq!(tensor.dtype(), E::DTYPE);
    tensor.clone().into_data().try_into_vec::<E>().unwrap()
}

/// A tensor of this content, and a second handle of its memory if it is to be shared.
fn formed<const D: usize, E: Item>(
    data: Vec<E>,
    dims: [usize; D],
    form: Form,
) -> (Tensor<D, E::Kind>, Option<Tensor<D, E::Kind>>) {
    let device = Device::flex();
    let width: usize = dims[1..].iter().product();
    let plain = |data, device: &Device| plain::<D, E>(data, dims, device);
    match form {
        // There is nothing to be laid out, and burn does not slice it.
        Form::Strided | Form::Sliced | Form::Columns if data.is_empty() => (plain(data, &device), None),
        Form::Plain => (plain(data, &device), None),
        Form::Shared => {
            let tensor = plain(data, &device);
            (tensor.clone(), Some(tensor))
        }
        Form::Strided => {
            let turned = plain(data, &device).swap_dims(0, D - 1).into_data();
            (Tensor::from_data(turned, (&device, E::DTYPE)).swap_dims(0, D - 1), None)
        }
        Form::Sliced => {
            let filler = |rows: usize| vec![E::any(7); rows * width];
            let mut larger = dims;
            larger[0] += 3;
            let tensor = self::plain::<D, E>([filler(2), data, filler(1)].concat(), larger, &device);
            (tensor.slice_dim(0, 2..2 + dims[0]), None)
        }
        Form::Columns => {
            let mut larger = dims;
            larger[D - 1] += 2;
            let row = |row: &[E]| [&[E::any(3)], row, &[E::any(4)]].concat();
            let tensor = self::plain::<D, E>(data.chunks(dims[D - 1]).flat_map(row).collect(), larger, &device);
            (tensor.slice_dim(D - 1, 1..1 + dims[D - 1]), None)
        }
        Form::Autodiff => (plain(data, &device.autodiff()), None),
    }
}

/// Every collective on tensors of `D` dims, in every form.
fn tensors<const D: usize, E: Item>(comm: &Communicator, seed: u64, dims: [usize; D]) -> Result<(), Error> {
    let (rank, size) = (comm.rank(), comm.size());
    let (len, width) = (dims.iter().product(), dims[1..].iter().product::<usize>());
    let root = seed as usize % size;
    let op = [ReduceOp::Max, ReduceOp::Min][seed as usize % 2];
    let expected = reduced::<E>(seed, size, len, op).unwrap();
    let with_rows = |rows: usize| {
        let mut dims = dims;
        dims[0] = rows;
        dims
    };
    let check = |result: Tensor<D, E::Kind>, expected: &[E], dims: [usize; D], what: (&str, Form)| {
        equal(&values::<D, E>(&result), expected, what);
        assert_eq!(result.dims(), dims, "{what:?}");
        let device = if what.1 == Form::Autodiff { Device::flex().autodiff() } else { Device::flex() };
        assert_eq!(result.device(), device, "{what:?}");
    };
    for form in FORMS {
        // Ranks need not agree on how their tensors lie: the others bring plain ones.
        let form = if rank == root || form == Form::Autodiff { form } else { Form::Plain };
        let mine = || formed::<D, E>(input(seed, rank, len), dims, form);
        let untouched = |other: Option<Tensor<D, E::Kind>>| {
            if let Some(other) = other {
                equal(&values::<D, E>(&other), &input::<E>(seed, rank, len), "the other handle");
            }
        };
        let (tensor, other) = mine();
        check(comm.all_reduce(tensor, op)?, &expected, dims, ("all_reduce", form));
        untouched(other);
        let ((one, other), (two, _)) = (mine(), mine());
        for result in comm.all_reduce_coalesced(vec![one, two], op)? {
            check(result, &expected, dims, ("all_reduce_coalesced", form));
        }
        untouched(other);
        let (tensor, other) = mine();
        if let Some(result) = comm.reduce(tensor, op, root)? {
            check(result, &expected, dims, ("reduce", form));
        }
        untouched(other);
        let (tensor, other) = mine();
        check(
            comm.broadcast(tensor, (root + 1) % size)?,
            &input(seed, (root + 1) % size, len),
            dims,
            ("broadcast", form),
        );
        untouched(other);

        let rows = part(dims[0], size, rank);
        let elements = rows.start * width..rows.end * width;
        let (tensor, other) = mine();
        check(
            comm.reduce_scatter(tensor, op)?,
            &expected[elements.clone()],
            with_rows(rows.len()),
            ("reduce_scatter", form),
        );
        untouched(other);
        let (tensor, other) = mine();
        let scattered = comm.scatter((rank == root).then_some(tensor), root)?;
        // Who brings nothing gets a tensor without autodiff.
        let home = if rank == root { form } else { Form::Plain };
        check(scattered, &input::<E>(seed, root, len)[elements], with_rows(rows.len()), ("scatter", home));
        untouched(other);

        let rows_of = |rank: usize| (mix(seed, rank, 1 << 41) % 4) as usize * dims[0] / 3;
        let ragged = || formed::<D, E>(input(seed, rank, rows_of(rank) * width), with_rows(rows_of(rank)), form).0;
        let all: Vec<E> = (0..size).flat_map(|rank| input::<E>(seed, rank, rows_of(rank) * width)).collect();
        let all_rows = with_rows((0..size).map(rows_of).sum());
        check(comm.all_gather(ragged())?, &all, all_rows, ("all_gather", form));
        if let Some(result) = comm.gather(ragged(), root)? {
            check(result, &all, all_rows, ("gather", form));
        }
        let mine_of = |from: usize| part(rows_of(from), size, rank);
        let exchanged: Vec<E> = (0..size)
            .flat_map(|from| {
                let rows = mine_of(from);
                input::<E>(seed, from, rows_of(from) * width)[rows.start * width..rows.end * width].to_vec()
            })
            .collect();
        let exchanged_rows = with_rows((0..size).map(|from| mine_of(from).len()).sum());
        check(comm.all_to_all(ragged())?, &exchanged, exchanged_rows, ("all_to_all", form));

        let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
        let (tensor, other) = mine();
        comm.send(tensor, next, 4)?;
        let received: Tensor<D, E::Kind> = comm.recv(previous, 4)?;
        // What came may be the sender's own memory; to change it here must not change it there.
        comm.all_reduce(received.clone(), op)?;
        check(received, &input(seed, previous, len), dims, ("recv", Form::Plain));
        untouched(other);
    }
    Ok(())
}

fn ranks_1_to_4<E: Item>(comm: &Communicator, seed: u64, dims: [usize; 4]) -> Result<(), Error> {
    let [a, b, c, d] = dims;
    tensors::<1, E>(comm, seed, [a])?;
    tensors::<2, E>(comm, seed, [a, b])?;
    tensors::<3, E>(comm, seed, [a, b, c])?;
    tensors::<4, E>(comm, seed, [a, b, c, d])
}

fn world<T: Send>(size: usize, f: impl Fn(Rank) -> Result<T, Error> + Sync) -> Vec<T> {
    launch::threads(size).threads_per_rank(1).timeout(Duration::from_secs(60)).run(f).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Also: the same bits on every rank, and in a second run.
    #[test]
    fn vectors_of_every_dtype(size in prop::sample::select(&SIZES[..]), seed: u64, len in prop_oneof![0..20usize, 1000..3000usize]) {
        let run = || world(size, |rank| {
            let mut alike = Vec::new();
            for_every_item!(vectors(&rank, seed, len, &mut alike));
            Ok(alike)
        });
        let results = run();
        prop_assert!(results.iter().all(|alike| *alike == results[0]));
        prop_assert!(run() == results);
    }

    #[test]
    fn tensors_of_every_dtype_rank_and_layout(
        size in prop::sample::select(&SIZES[..]),
        seed: u64,
        (a, b, c, d) in (0..11usize, 0..5usize, 1..4usize, 1..4usize),
    ) {
        world(size, |rank| {
            for_every_item!(ranks_1_to_4(&rank, seed, [a, b, c, d]));
            Ok(())
        });
    }

    /// Groups by color and key, groups of groups, and all of them at work at once.
    #[test]
    fn groups_of_groups(
        size in 1..9usize,
        colors in prop::collection::vec((0..3u64, -2..3i64), 8),
        nested in prop::collection::vec((prop_oneof![Just(0), Just(u64::MAX)], any::<i64>()), 8),
        seed: u64,
    ) {
        // Members of the group of `rank` among `among`, in order.
        let members = |among: &[usize], by: &[(u64, i64)], rank: usize| {
            let mut members: Vec<usize> = among.iter().copied().filter(|other| by[*other].0 == by[rank].0).collect();
            members.sort_by_key(|other| (by[*other].1, among.iter().position(|rank| rank == other)));
            members
        };
        world(size, |rank| {
            let me = rank.rank();
            let outer = rank.split(colors[me].0, colors[me].1)?;
            let inner = outer.split(nested[me].0, nested[me].1)?;
            let everybody: Vec<usize> = (0..size).collect();
            let outer_members = members(&everybody, &colors, me);
            let inner_members = members(&outer_members, &nested, me);
            for (comm, members) in [(rank.world(), &everybody), (&outer, &outer_members), (&inner, &inner_members)] {
                assert_eq!((comm.size(), members[comm.rank()]), (members.len(), me));
                assert_eq!(comm.all_gather(vec![me as u64])?, members.iter().map(|rank| *rank as u64).collect::<Vec<_>>());
            }
            assert_eq!(outer.group().as_ref(), format!("world/{}", colors[me].0));
            // Three groups in flight, in another order on every rank.
            let groups = [(rank.world(), &everybody), (&outer, &outer_members), (&inner, &inner_members)];
            let mut pending = Vec::new();
            for turn in 0..3 {
                let (comm, members) = &groups[(turn + me) % 3];
                for round in 0..3 {
                    let mine = vec![(me * round) as i64; (seed % 50) as usize];
                    let expected = members.iter().map(|rank| (rank * round) as i64).sum::<i64>();
                    pending.push((comm.start(move |comm| comm.all_reduce(mine, ReduceOp::Sum)), expected));
                }
            }
            for (pending, expected) in pending {
                assert_eq!(pending.wait()?, vec![expected; (seed % 50) as usize]);
            }
            vectors::<f32>(&inner, seed, 9, &mut Vec::new())?;
            vectors::<i16>(&outer, seed, 5, &mut Vec::new())
        });
    }
}

#[test]
fn sums_that_everybody_knows() {
    for size in SIZES {
        let n = size as i64;
        world(size, |rank| {
            let r = rank.rank() as i64;
            let mine: Vec<i64> = (1..=7).map(|i| (r + 1) * i).collect();
            let triangle: Vec<i64> = (1..=7).map(|i| n * (n + 1) / 2 * i).collect();
            assert_eq!(rank.all_reduce(mine.clone(), ReduceOp::Sum)?, triangle);
            assert_eq!(rank.all_reduce(mine.clone(), ReduceOp::Max)?, (1..=7).map(|i| n * i).collect::<Vec<_>>());
            assert_eq!(rank.all_reduce(mine.clone(), ReduceOp::Min)?, (1..=7).collect::<Vec<_>>());
            let factorial: i64 = (1..=n).product();
            assert_eq!(rank.all_reduce(vec![r + 1], ReduceOp::Product)?, [factorial]);
            assert_eq!(rank.all_reduce(vec![r as f32], ReduceOp::Mean)?, [(n - 1) as f32 / 2.0]);
            assert_eq!(rank.all_reduce(vec![r > 0], ReduceOp::Max)?, [size > 1]);
            assert_eq!(rank.all_reduce(vec![r > 0], ReduceOp::Min)?, [false]);
            // A token-exact average: the factor is each rank's count over the count of all.
            let count = (r + 1) as f64 / (n * (n + 1) / 2) as f64;
            let mean = rank.all_reduce(vec![1.0f64, 10.0], ReduceOp::PreMulSum(count))?;
            assert!((mean[0] - 1.0).abs() < 1e-12 && (mean[1] - 10.0).abs() < 1e-11);
            Ok(())
        });
    }
}

#[test]
fn halves_are_rounded_once() {
    // 2048 + 1 is 2048 in f16: folded in f16 the ones would be lost one by one.
    world(4, |rank| {
        let mine = if rank.rank() == 0 { 2048.0 } else { 1.0 };
        assert_eq!(rank.all_reduce(vec![f16::from_f32(mine)], ReduceOp::Sum)?, [f16::from_f32(2052.0)]);
        let mine = if rank.rank() == 0 { 256.0 } else { 1.0 };
        assert_eq!(rank.all_reduce(vec![bf16::from_f32(mine)], ReduceOp::Sum)?, [bf16::from_f32(260.0)]);
        // 65504 is the largest f16; the sum is beyond it and the mean is not.
        assert_eq!(rank.all_reduce(vec![f16::MAX], ReduceOp::Mean)?, [f16::MAX]);
        assert_eq!(rank.all_reduce(vec![f16::MAX], ReduceOp::Sum)?, [f16::INFINITY]);
        Ok(())
    });
}

#[test]
fn a_nan_on_any_rank_is_seen() {
    for size in [1, 2, 3, 8] {
        for culprit in 0..size {
            world(size, |rank| {
                let mine = |nan: f64, number: f64| if rank.rank() == culprit { nan } else { number };
                for op in [ReduceOp::Max, ReduceOp::Min] {
                    // Enough for vector instructions and a remainder.
                    assert!(rank.all_reduce(vec![mine(f64::NAN, 1.0); 37], op)?.iter().all(|x| x.is_nan()));
                    assert!(rank.all_reduce(vec![mine(f64::NAN, 1.0) as f32; 37], op)?.iter().all(|x| x.is_nan()));
                    assert!(
                        rank.all_reduce(vec![f16::from_f64(mine(f64::NAN, 1.0)); 37], op)?.iter().all(|x| x.is_nan())
                    );
                    assert!(
                        rank.all_reduce(vec![bf16::from_f64(mine(f64::NAN, 1.0)); 37], op)?.iter().all(|x| x.is_nan())
                    );
                }
                Ok(())
            });
        }
    }
}

fn tensor_at(data: Vec<f32>, dims: &[usize]) -> (FlexTensor, *const u8) {
    let tensor = FlexTensor::from_data(TensorData::new(data, dims.to_vec()));
    let place = tensor.bytes().as_ptr();
    (tensor, place)
}

#[test]
fn the_same_memory_comes_back() {
    world(3, |rank| {
        let mine = vec![1.0f32; 1000];
        let place = mine.as_ptr();
        let sum = rank.all_reduce(mine, ReduceOp::Sum)?;
        assert_eq!(sum.as_ptr(), place);
        let same = rank.broadcast(sum, 1)?;
        assert_eq!(same.as_ptr(), place);
        let bools = vec![true; 77];
        let place = bools.as_ptr();
        let bools = rank.all_reduce(bools, ReduceOp::Max)?;
        assert_eq!(bools.as_ptr(), place);
        let pieces = vec![vec![1u8; 9], vec![2; 30]];
        let places: Vec<_> = pieces.iter().map(|piece| piece.as_ptr()).collect();
        let pieces = rank.all_reduce_coalesced(pieces, ReduceOp::Sum)?;
        assert_eq!(pieces.iter().map(|piece| piece.as_ptr()).collect::<Vec<_>>(), places);

        let home = |tensor: Tensor<2>| tensor.try_into_primitive::<Flex>().unwrap().bytes().as_ptr();
        let (tensor, place) = tensor_at(vec![1.0; 600], &[20, 30]);
        let sum = rank.all_reduce(Tensor::<2>::from_primitive::<Flex>(tensor), ReduceOp::Sum)?;
        assert_eq!(home(sum), place);
        // A part of something larger, of which nothing else is held, is worked on where it is.
        let (tensor, place) = tensor_at(vec![1.0; 600], &[20, 30]);
        let sum = rank.all_reduce(Tensor::<2>::from_primitive::<Flex>(tensor).slice_dim(0, 4..9), ReduceOp::Sum)?;
        assert_eq!(sum.to_data(), TensorData::new(vec![3.0f32; 150], [5, 30]));
        assert_eq!(home(sum), place);
        // Messages move the tensor itself.
        let (tensor, place) = tensor_at(vec![rank.rank() as f32; 600], &[20, 30]);
        let (next, previous) = ((rank.rank() + 1) % 3, (rank.rank() + 2) % 3);
        rank.send(Tensor::<2>::from_primitive::<Flex>(tensor), next, 0)?;
        let places = rank.all_gather(vec![place.addr() as u64])?;
        assert_eq!(home(rank.recv::<Tensor<2>>(previous, 0)?).addr() as u64, places[previous]);
        Ok(())
    });
}

#[test]
fn tensors_of_an_autodiff_device_come_back_to_it() {
    world(2, |rank| {
        let device = Device::flex().autodiff();
        let weight = Tensor::<1>::ones([3], &device).require_grad();
        let sum = rank.all_reduce(weight.clone() * 2.0, ReduceOp::Sum)?;
        assert_eq!(sum.device(), device);
        assert!(!sum.is_require_grad());
        // A constant from then on: the gradient flows through the other factor alone.
        let gradients = (sum * weight.clone()).sum().backward();
        assert_eq!(weight.grad(&gradients).unwrap().into_data(), TensorData::from([4.0f32; 3]));
        Ok(())
    });
}

#[test]
fn bytes_and_calls_are_exact() {
    for size in SIZES {
        let (n, s) = (size as u64, 8 * 3 * 5 * 7 * 4u64);
        let counted = world(size, |rank| {
            let before = rank.counters();
            let one = |name: &'static str, bytes: u64, before: Counters| {
                let since = rank.counters() - before;
                let calls: Vec<_> = since.iter().map(|(name, tally)| (name, tally.calls, tally.bytes)).collect();
                assert_eq!(calls, [(name, 1, bytes)]);
                assert!(since.total().time > Duration::ZERO);
                rank.counters()
            };
            let mine = || vec![1.0f32; s as usize / 4];
            let share = s / n;
            rank.all_reduce(mine(), ReduceOp::Sum)?;
            let before = one("all_reduce", 2 * (n - 1) * share, before);
            rank.all_reduce_coalesced(vec![mine()[..100].to_vec(), mine()[100..].to_vec()], ReduceOp::Sum)?;
            let before = one("all_reduce", 2 * (n - 1) * share, before);
            rank.start(move |comm| comm.all_reduce(vec![1.0f32; s as usize / 4], ReduceOp::Sum)).wait()?;
            let before = one("all_reduce", 2 * (n - 1) * share, before);
            rank.reduce_scatter(mine(), ReduceOp::Sum)?;
            let before = one("reduce_scatter", (n - 1) * share, before);
            rank.all_gather(mine())?;
            let before = one("all_gather", (n - 1) * s, before);
            rank.all_to_all(mine())?;
            let before = one("all_to_all", (n - 1) * share, before);
            let me = rank.rank() as u64;
            rank.broadcast(mine(), 0)?;
            let before = one("broadcast", if me == 0 { 0 } else { s }, before);
            rank.reduce(mine(), ReduceOp::Sum, 0)?;
            let before = one("reduce", (n - 1) * share + if me == 0 { 0 } else { share }, before);
            rank.gather(mine(), 0)?;
            let before = one("gather", if me == 0 { (n - 1) * s } else { 0 }, before);
            rank.scatter((me == 0).then(mine), 0)?;
            let before = one("scatter", if me == 0 { 0 } else { share }, before);
            rank.barrier()?;
            let before = one("barrier", 0, before);
            let part = rank.split(0, 0)?;
            let before = one("split", 0, before);
            rank.send(mine(), rank.rank(), 1)?;
            let before = one("send", s, before);
            rank.recv::<Vec<f32>>(rank.rank(), 1)?;
            one("recv", s, before);
            // A group counts for itself, and calls that are refused do not count.
            assert_eq!(part.counters(), Counters::default());
            rank.all_reduce(vec![true], ReduceOp::Sum).unwrap_err();
            part.all_reduce(vec![0u8; 10], ReduceOp::Max)?;
            assert_eq!(rank.counters().of("all_reduce").calls, 3);
            Ok(part.counters().of("all_reduce").bytes)
        });
        // 10 bytes do not divide by 3, 4 or 8: what the ranks move together is exact all the same.
        assert_eq!(counted.iter().sum::<u64>(), 2 * (n - 1) * 10);
    }
}

#[test]
fn tags_are_independent_and_in_order() {
    world(2, |rank| {
        let other = 1 - rank.rank();
        for round in 0..200u64 {
            rank.send(vec![round], other, round % 5)?;
        }
        let waiting: Vec<_> = (0..5).map(|tag| rank.start_recv::<Vec<u64>>(other, tag)).collect();
        for tag in (0..5).rev() {
            let first = if tag == 3 { 1 } else { 0 };
            if tag == 3 {
                assert_eq!(rank.recv::<Vec<u64>>(other, 3)?, [3]);
            }
            for round in first..39 {
                assert_eq!(rank.recv::<Vec<u64>>(other, tag)?, [round * 5 + tag]);
            }
        }
        for (tag, last) in waiting.into_iter().enumerate() {
            assert_eq!(last.wait()?, [195 + tag as u64], "a deferred receive takes what is left");
        }
        Ok(())
    });
}

#[test]
fn in_flight_and_direct_calls_interleave() {
    world(4, |rank| {
        let part = rank.split(rank.rank() as u64 / 2, 0)?;
        for round in 0..50i64 {
            let big = rank.start(move |comm| comm.all_reduce(vec![round; 5000], ReduceOp::Sum));
            let small = part.start(move |comm| comm.all_gather(vec![round]));
            let two = rank.start(move |comm| {
                let sum = comm.all_reduce(vec![1i64], ReduceOp::Sum)?;
                comm.broadcast(vec![sum[0] + comm.rank() as i64], 2)
            });
            // Waits for what is in flight on `rank`, not for `part`.
            assert_eq!(rank.all_reduce(vec![rank.rank() as i64], ReduceOp::Max)?, [3]);
            assert_eq!(part.all_reduce(vec![1i64], ReduceOp::Sum)?, [2]);
            if round % 3 == 0 {
                drop(big);
            } else {
                assert_eq!(big.wait()?, vec![4 * round; 5000]);
            }
            assert_eq!(two.wait()?, [6]);
            assert_eq!(small.wait()?, [round, round]);
        }
        Ok(())
    });
}

/// More ranks than cores, thousands of collectives of all kinds on three groups, in flight and direct.
#[test]
fn stress() {
    const ROUNDS: usize = 600;
    world(8, |rank| {
        let halves = rank.split(rank.rank() as u64 % 2, 0)?;
        let quarters = halves.split(halves.rank() as u64 / 2, -(halves.rank() as i64))?;
        let groups = [rank.world(), &halves, &quarters];
        let mut pending = std::collections::VecDeque::new();
        for round in 0..ROUNDS {
            for (place, comm) in groups.iter().enumerate() {
                // The same choice on all ranks of the group.
                let choice = mix(11, place, round);
                let len = (choice >> 8) as usize % 300;
                let size = comm.size();
                match choice % 8 {
                    0 => comm.barrier()?,
                    1 => vectors::<bf16>(comm, choice, len % 20, &mut Vec::new())?,
                    2 => equal(&comm.all_gather(input::<u16>(choice, comm.rank(), 3))?[..3], &input(choice, 0, 3), 2),
                    3 => {
                        let mine = input::<i32>(choice, comm.rank(), len);
                        let started = comm.start(move |comm| comm.all_reduce(mine, ReduceOp::Sum));
                        pending.push_back((started, reduced::<i32>(choice, size, len, ReduceOp::Sum).unwrap()));
                    }
                    4 => {
                        let other = (comm.rank() + choice as usize % size) % size;
                        let from = (comm.rank() + size - choice as usize % size) % size;
                        comm.send(vec![comm.rank() as u64, choice], other, choice)?;
                        assert_eq!(comm.recv::<Vec<u64>>(from, choice)?, [from as u64, choice]);
                    }
                    _ => {
                        let result = comm.all_reduce(input::<f32>(choice, comm.rank(), len), ReduceOp::Sum)?;
                        equal(&result, &reduced::<f32>(choice, size, len, ReduceOp::Sum).unwrap(), round);
                    }
                }
            }
            while pending.len() > 4 {
                let Some((started, expected)) = pending.pop_front() else { break };
                assert_eq!(started.wait()?, expected);
            }
        }
        Ok(())
    });
}
