//! Parameters of which every replica holds its rows only (ZeRO 3), in models that run by their own forward.
//!
//! # How an unmodified module runs on rows
//!
//! A parameter keeps a *placeholder* in the module: a tensor of its dims in which one element stands for all, so that
//! layers that look at the dims of a weight find them. It carries a burn
//! [`Reparameterization`](burn::module::Reparameterization), the [`RowShard`], which holds this rank's rows as a
//! parameter of their own, under the id of the original. Each use of the parameter gathers the rows of all ranks
//! ([`Gatherer`]).
//!
//! # What is in memory when
//!
//! Parameters are gathered by [groups](crate::sharding). The wholes of a group live until a parameter of another group
//! is used, and the next group is gathered meanwhile, as soon as it is known which one comes next. The operations of a
//! forward do not keep the wholes for backward: the gather is marked as one that burn computes again ([`operation`]),
//! as it does for gradient checkpointing, and its second computation is the second gather. Which of them burn computes
//! again depends on the rows of a rank, so all ranks gather all of them ([`backward_order`]). Its backward hands the
//! gradient of the whole to the reducer, which reduce-scatters it. What other operations make of a whole, a view above
//! all, burn computes again only on a device with gradient checkpointing, which is demanded therefore ([`kept`]), and
//! else keeps. Small vectors are kept in any case.
//!
//! # Ranks without data
//!
//! In a round in which a rank has no micro-batch, the first rank that has one says before each gather which it is, and
//! the ranks without data take part in it ([`Gatherer::follow`]).
//!
//! # Ranks that use different parameters
//! Every rank says before each gather what it wants, and all gather what comes first ([`wants`]).

mod adapters;
mod assemble;
mod backward_order;
mod checked;
mod gatherer;
mod gathers;
mod group_numbers;
mod kept;
mod leader;
mod logical;
mod merge;
mod operation;
mod row_shard;
mod stand_in;
mod wants;
mod wrap;

pub(super) use assemble::{assemble, meta_whole, shards_of};
pub(super) use checked::checked_params;
pub(super) use gatherer::Gatherer;
pub(super) use kept::{OnDeviceOf, is_of_two_devices, of_two_devices};
pub(super) use logical::Logical;
pub(super) use wrap::shard_parameters;
