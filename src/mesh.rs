//! The device mesh: named axes over the ranks of a world.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::Error;
use crate::comm::Communicator;

/// The ranks of a world arranged along named axes, like the cells of a box.
///
/// Axes are given from the outermost to the innermost: ranks that differ only on the last axis have consecutive world
/// ranks. Put the axis that talks most last, where ranks are nearest to each other. Along every axis there is a
/// [`Communicator`] that joins the ranks which differ on that axis alone.
///
/// ```
/// use burn_parallel::prelude::*;
///
/// launch::threads(4).run(|world| {
///     let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
///     let (dp, tp) = (mesh.axis("dp")?, mesh.axis("tp")?);
///     assert_eq!(world.rank(), dp.rank() * 2 + tp.rank());
///     assert_eq!(tp.all_gather(vec![world.rank() as i64])?, [dp.rank() as i64 * 2, dp.rank() as i64 * 2 + 1]);
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Mesh {
    axes: Arc<[Axis]>,
    all: Communicator,
}

#[derive(Debug)]
struct Axis {
    name: String,
    size: usize,
    coordinate: usize,
    comm: Communicator,
}

impl Mesh {
    /// Arranges the ranks of `world` along axes of these names and sizes. Collective: every rank makes the same mesh.
    ///
    /// # Errors
    ///
    /// [`Error::Mesh`] if there is no axis, a size is 0, the sizes do not multiply to the size of the world, or a name
    /// is empty or repeated; found before anything is communicated. And if ranks name other axes than rank 0.
    pub fn new<'a>(world: &Communicator, axes: impl IntoIterator<Item = (&'a str, usize)>) -> Result<Self, Error> {
        let axes: Vec<(&str, usize)> = axes.into_iter().collect();
        check(&axes, world.size())?;
        agree(&axes, world)?;
        let mut made = Vec::with_capacity(axes.len());
        let mut inner = 1;
        for &(name, size) in axes.iter().rev() {
            let coordinate = world.rank() / inner % size;
            // Ranks that agree on everything but this coordinate share a color.
            let color = world.rank() - coordinate * inner;
            let comm = world.split_named(name, color as u64, coordinate as i64)?;
            made.push(Axis { name: name.to_owned(), size, coordinate, comm });
            inner *= size;
        }
        made.reverse();
        Ok(Self { axes: made.into(), all: world.clone() })
    }

    /// The communicator along an axis: it joins the ranks that differ from this one on that axis alone, in its order.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no axis of this name.
    pub fn axis(&self, name: &str) -> Result<Communicator, Error> {
        self.find(name).map(|axis| axis.comm.clone())
    }

    /// This rank's place on an axis.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no axis of this name.
    pub fn coordinate(&self, name: &str) -> Result<usize, Error> {
        self.find(name).map(|axis| axis.coordinate)
    }

    /// Names and sizes of the axes, outermost first.
    pub fn axes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.axes.iter().map(|axis| (axis.name.as_str(), axis.size))
    }

    /// This rank's place on every axis, outermost first.
    pub fn coordinates(&self) -> Vec<usize> {
        self.axes.iter().map(|axis| axis.coordinate).collect()
    }

    /// The communicator of all ranks of this mesh.
    pub fn all(&self) -> &Communicator {
        &self.all
    }

    /// The mesh of some of the axes, in the order given here, that this rank is in: the ranks that agree with it on all
    /// the other axes. Collective over the mesh. The sub-mesh of one axis is that axis; [`all`](Self::all) of a
    /// sub-mesh of two joins both, as for a loss that is averaged over `dp` and `sp`.
    ///
    /// # Errors
    /// [`Error::Mesh`] if a name is unknown or repeated, or none is given.
    pub fn sub_mesh<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Self, Error> {
        let chosen: Vec<(&str, &Axis)> =
            names.into_iter().map(|name| self.find(name).map(|axis| (name, axis))).collect::<Result<_, _>>()?;
        let sizes: Vec<(&str, usize)> = chosen.iter().map(|(name, axis)| (*name, axis.size)).collect();
        check(&sizes, sizes.iter().map(|(_, size)| size).product())?;
        Self::new(&self.over(&chosen)?, sizes)
    }

    /// The ranks that agree with this one on all axes but these. Collective over the mesh.
    ///
    /// # Errors
    /// As [`sub_mesh`](Self::sub_mesh).
    pub(crate) fn joint(&self, names: &[&str]) -> Result<Communicator, Error> {
        let chosen =
            names.iter().map(|name| self.find(name).map(|axis| (*name, axis))).collect::<Result<Vec<_>, _>>()?;
        self.over(&chosen)
    }

    fn over(&self, chosen: &[(&str, &Axis)]) -> Result<Communicator, Error> {
        let others = self.axes.iter().filter(|axis| !chosen.iter().any(|(name, _)| *name == axis.name));
        let color = others.fold(0, |color, axis| color * axis.size + axis.coordinate);
        let key = chosen.iter().fold(0, |key, (_, axis)| key * axis.size + axis.coordinate);
        self.all.split(color as u64, key as i64)
    }

    fn find(&self, name: &str) -> Result<&Axis, Error> {
        self.axes.iter().find(|axis| axis.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.axes.iter().map(|axis| axis.name.as_str()).collect();
            Error::Mesh { problem: format!("there is no axis `{name}`; the axes are {known:?}") }
        })
    }
}

/// Demands the same axes of all ranks: else each would have groups in which the others do not see it.
fn agree(axes: &[(&str, usize)], world: &Communicator) -> Result<(), Error> {
    let mut hasher = DefaultHasher::new();
    axes.hash(&mut hasher);
    let all = world.all_gather(vec![hasher.finish()])?;
    let Some(rank) = all.iter().position(|other| *other != all[0]) else { return Ok(()) };
    let problem = format!(
        "rank {rank} of group `{}` names other axes than rank 0: give every rank the same ones, with the same sizes",
        world.group()
    );
    Err(Error::Mesh { problem })
}

fn check(axes: &[(&str, usize)], world: usize) -> Result<(), Error> {
    let wrong = |problem| Err(Error::Mesh { problem });
    let named = || axes.iter().map(|(name, size)| format!("{name} {size}")).collect::<Vec<_>>().join(" x ");
    if axes.is_empty() {
        return wrong("at least one axis is needed".into());
    }
    for (place, (name, size)) in axes.iter().enumerate() {
        if name.is_empty() {
            return wrong(format!("axis {place} of size {size} has no name"));
        }
        if axes[..place].iter().any(|(earlier, _)| earlier == name) {
            return wrong(format!("axis `{name}` is named twice in {}", named()));
        }
        if *size == 0 {
            return wrong(format!("axis `{name}` has size 0; an axis that is not used has size 1"));
        }
    }
    let product = axes.iter().try_fold(1usize, |product, (_, size)| product.checked_mul(*size));
    match product {
        Some(product) if product == world => Ok(()),
        Some(product) => wrong(format!("{} makes {product} ranks, but the world has {world}", named())),
        None => wrong(format!("{} makes more ranks than can be counted", named())),
    }
}
