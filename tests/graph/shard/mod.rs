//! Partitioned graphs, run by threads: any split, over one axis or two, trains like one device.

mod axes;
mod background;
mod convolution;
mod dtypes;
mod fuse;
mod golden;
mod harness;
mod memory;
mod merged;
mod overlap;
mod padding;
mod plans;
mod random;
mod sequence;
mod vocabulary;
