//! Every collective against a plain reference, for every dtype, odd shapes and layouts.
//!
//! Every rank can compute what every other rank brings, so each checks its own results.

use std::fmt::Debug;

use burn::tensor::{Device, Tensor, TensorData, bf16, f16};
use burn_parallel::Error;
use burn_parallel::comm::{Communicator, ReduceOp, part};

use super::items::*;

/// Every collective on vectors. Adds the bits of what all ranks must have alike to `alike`.
pub fn vectors<E: Item>(comm: &Communicator, seed: u64, len: usize, alike: &mut Vec<u64>) -> Result<(), Error> {
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
    let mut shares = vec![E::any(5); size * len];
    shares[rank * len..][..len].copy_from_slice(&mine());
    comm.all_gather_in_place(&mut shares)?;
    let expected: Vec<E> = (0..size).flat_map(|rank| input::<E>(seed, rank, len)).collect();
    equal(&shares, &expected, "all_gather_in_place");
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

pub trait CloneParts<E> {
    fn clone_parts(self) -> (Vec<E>, Vec<E>);
}

impl<E: Clone> CloneParts<E> for (&[E], &[E]) {
    fn clone_parts(self) -> (Vec<E>, Vec<E>) {
        (self.0.to_vec(), self.1.to_vec())
    }
}

/// How a tensor lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
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

pub const FORMS: [Form; 6] = [Form::Plain, Form::Shared, Form::Strided, Form::Sliced, Form::Columns, Form::Autodiff];

pub fn plain<const D: usize, E: Item>(data: Vec<E>, dims: [usize; D], device: &Device) -> Tensor<D, E::Kind> {
    Tensor::from_data(TensorData::new(data, dims), (device, E::DTYPE))
}

pub fn values<const D: usize, E: Item>(tensor: &Tensor<D, E::Kind>) -> Vec<E> {
    assert_eq!(tensor.dtype(), E::DTYPE);
    tensor.clone().into_data().try_into_vec::<E>().unwrap()
}

/// A tensor of this content, and a second handle of its memory if it is to be shared.
pub fn formed<const D: usize, E: Item>(
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
pub fn tensors<const D: usize, E: Item>(comm: &Communicator, seed: u64, dims: [usize; D]) -> Result<(), Error> {
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

pub fn ranks_1_to_4<E: Item>(comm: &Communicator, seed: u64, dims: [usize; 4]) -> Result<(), Error> {
    let [a, b, c, d] = dims;
    tensors::<1, E>(comm, seed, [a])?;
    tensors::<2, E>(comm, seed, [a, b])?;
    tensors::<3, E>(comm, seed, [a, b, c])?;
    tensors::<4, E>(comm, seed, [a, b, c, d])
}

/// [`vectors`] of every dtype, and the same bits on every rank.
pub fn vectors_alike(comm: &Communicator, seed: u64, len: usize) -> Result<(), Error> {
    let mut alike = Vec::new();
    for_every_item!(vectors(comm, seed, len, &mut alike));
    let all = comm.all_gather(alike.clone())?;
    assert!(all.chunks(alike.len().max(1)).all(|theirs| theirs == alike), "the ranks differ");
    Ok(())
}

/// [`ranks_1_to_4`] of every dtype.
pub fn every_tensor(comm: &Communicator, seed: u64, dims: [usize; 4]) -> Result<(), Error> {
    for_every_item!(ranks_1_to_4(comm, seed, dims));
    Ok(())
}
