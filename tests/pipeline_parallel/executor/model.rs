//! A model cut by hand, with everything that is awkward to cut, and the same model on one device.

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::activation::{log_softmax, tanh};
use burn::tensor::{Bool, DType, Device, Int, Tensor};
use burn_parallel::Error;
use burn_parallel::pipeline_parallel::schedule::Edge;
use burn_parallel::pipeline_parallel::{Received, Sent};

pub const WIDTH: usize = 6;
pub const VOCABULARY: usize = 11;

/// What every rank gets for a micro-batch: rows of tokens, of which 0 is no token.
#[derive(Debug, Clone)]
pub struct Tokens(pub Tensor<2, Int>);

/// Micro-batches of different shapes, with different numbers of tokens in each, one without any.
pub fn batch(micro_batches: usize, seed: usize) -> Vec<Tokens> {
    let micro_batch = |index: usize| {
        let (rows, columns) = (1 + (index + seed) % 3, 2 + (2 * index + seed) % 4);
        let token = |place: usize| match (place + index) % 4 == 1 || index == 3 {
            true => 0,
            false => ((7 * place + 5 * index + 3 * seed) % (VOCABULARY - 1) + 1) as i64,
        };
        let tokens: Vec<i64> = (0..rows * columns).map(token).collect();
        Tokens(Tensor::<1, Int>::from_data(tokens.as_slice(), &Device::flex()).reshape([rows, columns]))
    };
    (0..micro_batches).map(micro_batch).collect()
}

/// A stage's layers: the first one embeds, the last one has the head.
#[derive(Module, Debug)]
pub struct Block {
    embedding: Option<Embedding>,
    linear: Linear,
    head: Option<Linear>,
}

pub fn blocks(stages: usize) -> Vec<Block> {
    let device = Device::flex().autodiff();
    let block = |stage: usize| Block {
        embedding: (stage == 0).then(|| EmbeddingConfig::new(VOCABULARY, WIDTH).init(&device)),
        linear: LinearConfig::new(WIDTH, WIDTH).init(&device),
        head: (stage + 1 == stages).then(|| LinearConfig::new(WIDTH, VOCABULARY).init(&device)),
    };
    (0..stages).map(block).collect()
}

/// The tensors that go forward between stages.
///
/// Neighbours: the activations, and the mask. From the first stage to the last: its activations and the tokens
/// (integers). From the second to the last, where that skips stages: its activations in `f64`.
pub fn edges(stages: usize) -> Vec<Edge> {
    let last = stages - 1;
    let mut edges: Vec<Edge> = (1..stages).map(|stage| Edge::new(stage - 1, stage, 2)).collect();
    match stages {
        1 => {}
        2 => edges[0].tensors += 2,
        _ => edges.push(Edge::new(0, last, 2)),
    }
    if stages > 3 {
        edges.push(Edge::new(1, last, 1));
    }
    edges
}

/// What has been computed before the last stage.
struct SoFar {
    hidden: Tensor<3>,
    mask: Tensor<2, Bool>,
    first: Tensor<3>,
    second: Option<Tensor<3>>,
    tokens: Tensor<2, Int>,
}

impl Block {
    fn layer(&self, hidden: Tensor<3>, mask: &Tensor<2, Bool>) -> Tensor<3> {
        let hidden = tanh(self.linear.forward(hidden));
        hidden.mask_fill(mask.clone().bool_not().unsqueeze_dim::<3>(2).expand_as_hidden(), 0.0)
    }

    fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.embedding.as_ref().expect("the first stage embeds").forward(tokens)
    }

    /// The sum over tokens, and their number.
    fn loss(&self, so_far: SoFar) -> (Tensor<1>, f64) {
        let SoFar { hidden, mask, first, second, tokens } = so_far;
        let mut hidden = self.layer(hidden, &mask) + first;
        if let Some(second) = second {
            hidden = hidden + second.cast(DType::F32);
        }
        let logits = self.head.as_ref().expect("the last stage has the head").forward(hidden);
        let of_token = log_softmax(logits, 2).gather(2, tokens.unsqueeze_dim(2)).squeeze_dim::<2>(2);
        let count = mask.clone().int().sum().into_scalar::<i64>() as f64;
        (-of_token.mask_fill(mask.bool_not(), 0.0).sum(), count)
    }
}

/// Every stage of the model, by what it has received.
pub fn forward(stages: usize, block: &Block, tokens: &Tokens, mut received: Received) -> Result<Sent, Error> {
    let (stage, last) = (received.stage(), stages - 1);
    let Tokens(input) = tokens;
    let (hidden, mask) = match stage {
        0 => (block.embed(input.clone()), input.clone().not_equal_elem(0)),
        _ => (received.float::<3>(stage - 1)?, received.bool::<2>(stage - 1)?),
    };
    if stage == last {
        let so_far = match stage {
            0 => SoFar { first: hidden.clone(), hidden, mask, second: None, tokens: input.clone() },
            _ => {
                let (first, tokens) = (received.float::<3>(0)?, received.int::<2>(0)?);
                let second = if stages > 3 { Some(received.float::<3>(1)?) } else { None };
                SoFar { hidden, mask, first, second, tokens }
            }
        };
        let (sum, count) = block.loss(so_far);
        return Ok(Sent::new().loss_sum(sum, count));
    }
    let hidden = block.layer(hidden, &mask);
    let mut sent = Sent::new().to(stage + 1, (hidden.clone(), mask));
    if stage == 0 {
        sent = sent.to(last, (hidden.clone(), input.clone()));
    }
    if stage == 1 && stages > 3 {
        sent = sent.to(last, hidden.cast(DType::F64));
    }
    Ok(sent)
}

/// The whole model on one device.
pub fn whole(blocks: &[Block], tokens: &Tokens) -> (Tensor<1>, f64) {
    let Tokens(tokens) = tokens;
    let mask = tokens.clone().not_equal_elem(0);
    let last = blocks.len() - 1;
    let mut hidden = blocks[0].embed(tokens.clone());
    let (mut first, mut second) = (hidden.clone(), None);
    for (stage, block) in blocks[..last].iter().enumerate() {
        hidden = block.layer(hidden, &mask);
        match stage {
            0 => first = hidden.clone(),
            1 if blocks.len() > 3 => second = Some(hidden.clone().cast(DType::F64)),
            _ => {}
        }
    }
    blocks[last].loss(SoFar { hidden, mask, first, second, tokens: tokens.clone() })
}

/// All values of a module's float parameters.
pub fn values<M: Module>(module: &M) -> Vec<f32> {
    struct Values(Vec<f32>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().inner().into_data().try_into_vec::<f32>().unwrap());
        }
    }
    let mut values = Values(Vec::new());
    module.visit(&mut values);
    values.0
}

trait ExpandAsHidden {
    fn expand_as_hidden(self) -> Tensor<3, Bool>;
}

impl ExpandAsHidden for Tensor<3, Bool> {
    fn expand_as_hidden(self) -> Tensor<3, Bool> {
        let [rows, columns, _] = self.dims();
        self.expand([rows, columns, WIDTH])
    }
}
