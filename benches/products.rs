//! What products take by themselves and put together, in one thread but for one table: what captured steps do, and what
//! they leave because it gains nothing. Shapes are those of the GPT of these benches and of SmolLM2-135M.
//!
//! Each table has ways to compute the same that take turns, and for each the median over rounds of its processor time
//! over that of the first. All are captured forward passes, with the products of captured steps.
//!
//! `layers`: layers of one input, forward, as one product: of weights that are put beside each other in each step, or
//! lie so. `weights`: the gradients of their weights. `sum`: the gradient of their input, as products that are added up
//! in a loop, as one operation, which is how it runs, and as one product of what is put beside each other.
//! `activation`: bias and GELU behind a product, at once or in blocks of rows or columns; and what a bias alone takes.
//! `packed`: what a product would gain if its weight were packed already. `parts`: a step of layers of one input as one
//! layer whose output is read in parts, over the layers by themselves. `threads`: layers of one input, forward, on a
//! rank with two threads, and the time that passes: burn's products, ours one by one, and as one operation, which is
//! how they run.
//!
//! `cargo bench --bench products -- [layers|weights|sum|activation|packed|parts|threads] [ROUNDS]`

mod figures;

use std::hint::black_box;
use std::sync::Mutex;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor, activation};
use burn_parallel::graph::{CustomOps, Executor, Forward, TensorTree, capture_forward, capture_step};
use burn_parallel::prelude::*;
use figures::{Figures, clock, median};

/// Rows, what they have, and what the layers that read them give.
const SHAPES: [(usize, usize, &[usize]); 4] = [
    (1024, 256, &[256, 256, 256]),
    (1024, 256, &[1024, 1024]),
    (256, 576, &[576, 192, 192]),
    (256, 576, &[1536, 1536]),
];
const RUNS_PER_TURN: usize = 6;

type Way<'a> = (&'static str, Box<dyn FnMut() + 'a>);

struct Turns {
    figures: Figures,
    rounds: usize,
    clock: fn() -> f64,
}

impl Turns {
    fn take(&mut self, what: &str, mut ways: Vec<Way<'_>>) {
        let mut times = vec![Vec::new(); ways.len()];
        for round in 0..=self.rounds {
            for turn in 0..ways.len() {
                let way = if round % 2 == 0 { turn } else { ways.len() - 1 - turn };
                let began = (self.clock)();
                (0..RUNS_PER_TURN).for_each(|_| (ways[way].1)());
                if round > 0 {
                    times[way].push(1e3 * ((self.clock)() - began) / RUNS_PER_TURN as f64);
                }
            }
        }
        println!("{what}");
        for ((way, _), own) in ways.iter().zip(&times) {
            let ratio = median(own.iter().zip(&times[0]).map(|(own, first)| own / first));
            println!("  {way}: {:.3} ms, {ratio:.3}", median(own.iter().copied()));
            self.figures.note(format!("{what}: {way}"), ratio, "ratio");
        }
    }
}

/// A forward pass that is captured, and gives what is not looked at.
fn captured<I: TensorTree + Clone + 'static>(
    inputs: I,
    run: impl Fn(I) -> Vec<Tensor<2>>,
) -> Result<Box<dyn FnMut()>, Error> {
    forward(inputs, CustomOps::new(), run)
}

fn forward<I: TensorTree + Clone + 'static>(
    inputs: I,
    ops: CustomOps,
    run: impl Fn(I) -> Vec<Tensor<2>>,
) -> Result<Box<dyn FnMut()>, Error> {
    let model: Linear = LinearConfig::new(1, 1).init(&Device::flex());
    let pass = capture_forward(&model, inputs.clone(), |_, inputs| run(inputs))?;
    let mut pass = Forward::new(pass, ops)?;
    Ok(Box::new(move || drop(black_box(pass.run(&model, inputs.clone()).expect("a forward")))))
}

fn numbers(rows: usize, columns: usize) -> Tensor<2> {
    Tensor::random([rows, columns], Distribution::Uniform(-1.0, 1.0), &Device::flex())
}

/// The shape in words, and what the layers read, their weights, and the gradients of what they give.
fn layers_of((rows, width, gives): (usize, usize, &[usize])) -> (String, Tensor<2>, Vec<Tensor<2>>, Vec<Tensor<2>>) {
    let each = |rows| gives.iter().map(|gives| numbers(rows, *gives)).collect();
    (format!("{rows} x {width} x {gives:?}"), numbers(rows, width), each(width), each(rows))
}

fn layers(turns: &mut Turns) -> Result<(), Error> {
    for shape in SHAPES {
        let (what, x, weights, _) = layers_of(shape);
        let beside = Tensor::cat(weights.clone(), 1);
        let inputs = (x.clone(), weights);
        let ways: Vec<Way<'_>> = vec![
            ("products", captured(inputs.clone(), |(x, w)| w.into_iter().map(|w| x.clone().matmul(w)).collect())?),
            ("of weights put beside each other", captured(inputs, |(x, w)| vec![x.matmul(Tensor::cat(w, 1))])?),
            ("of weights that lie so", captured((x, beside), |(x, w)| vec![x.matmul(w)])?),
        ];
        turns.take(&format!("layers {what}"), ways);
    }
    Ok(())
}

fn weights(turns: &mut Turns) -> Result<(), Error> {
    for shape in SHAPES {
        let (what, x, _, gradients) = layers_of(shape);
        let beside = Tensor::cat(gradients.clone(), 1);
        let each =
            |(x, dy): (Tensor<2>, Vec<Tensor<2>>)| dy.into_iter().map(|dy| x.clone().transpose().matmul(dy)).collect();
        let ways: Vec<Way<'_>> = vec![
            ("products", captured((x.clone(), gradients), each)?),
            (
                "of gradients that lie beside each other",
                captured((x, beside), |(x, dy)| vec![x.transpose().matmul(dy)])?,
            ),
        ];
        turns.take(&format!("weights {what}"), ways);
    }
    Ok(())
}

fn sum(turns: &mut Turns) -> Result<(), Error> {
    type Inputs = (Vec<Tensor<2>>, Vec<Tensor<2>>);
    let products = |(dy, w): Inputs| dy.into_iter().zip(w).map(|(dy, w)| dy.matmul(w.transpose())).collect::<Vec<_>>();
    let added = |products: Vec<Tensor<2>>| products.into_iter().reduce(|a, b| a + b).into_iter().collect();
    for shape in SHAPES {
        let (what, x, weights, gradients) = layers_of(shape);
        let inputs = (gradients, weights);
        let of_input = vec![x; inputs.0.len()];
        let (mut apart, mut adds) = (captured(inputs.clone(), products)?, captured(of_input, added)?);
        let beside = |(dy, w): Inputs| vec![Tensor::cat(dy, 1).matmul(Tensor::cat(w, 1).transpose())];
        let ways: Vec<Way<'_>> = vec![
            ("products and a loop", Box::new(move || (apart(), adds()).0)),
            ("one operation", captured(inputs.clone(), move |inputs| added(products(inputs)))?),
            ("of what is put beside each other", captured(inputs, beside)?),
        ];
        turns.take(&format!("sum {what}"), ways);
    }
    Ok(())
}

fn activation(turns: &mut Turns) -> Result<(), Error> {
    type Inputs = (Tensor<2>, Tensor<2>, Tensor<2>);
    let act = |(x, w, bias): Inputs| activation::gelu(x.matmul(w) + bias);
    for (rows, width, gives) in [(1024, 256, 1024), (256, 576, 1536)] {
        let inputs = (numbers(rows, width), numbers(width, gives), numbers(1, gives));
        let by_rows = |block: usize| {
            captured(inputs.clone(), move |(x, w, bias): Inputs| {
                x.split(block, 0).into_iter().map(|x| act((x, w.clone(), bias.clone()))).collect()
            })
        };
        let by_columns = |block: usize| {
            captured(inputs.clone(), move |(x, w, bias): Inputs| {
                let blocks = w.split(block, 1).into_iter().zip(bias.split(block, 1));
                blocks.map(|(w, bias)| act((x.clone(), w, bias))).collect()
            })
        };
        let ways: Vec<Way<'_>> = vec![
            ("at once", captured(inputs.clone(), move |inputs| vec![act(inputs)])?),
            ("the product alone", captured(inputs.clone(), |(x, w, _): Inputs| vec![x.matmul(w)])?),
            ("by 64 rows", by_rows(64)?),
            ("by 128 rows", by_rows(128)?),
            ("by 256 rows", by_rows(256)?),
            ("by 256 columns", by_columns(256)?),
            ("by 512 columns", by_columns(512)?),
        ];
        turns.take(&format!("activation {rows} x {width} x {gives}"), ways);
    }
    for (rows, width, gives) in [(1024, 256, 256), (256, 576, 576), (256, 576, 192)] {
        let inputs = (numbers(rows, width), numbers(width, gives), numbers(1, gives));
        let ways: Vec<Way<'_>> = vec![
            ("with a bias", captured(inputs.clone(), |(x, w, bias): Inputs| vec![x.matmul(w) + bias])?),
            ("without", captured(inputs, |(x, w, _): Inputs| vec![x.matmul(w)])?),
        ];
        turns.take(&format!("activation, bias alone {rows} x {width} x {gives}"), ways);
    }
    Ok(())
}

fn packed(turns: &mut Turns) -> Result<(), Error> {
    type Inputs = (Vec<Tensor<2>>, Tensor<2>);
    let each = |(x, w): Inputs| x.into_iter().map(|x| x.matmul(w.clone())).collect();
    for (rows, width, gives) in
        [(512, 256, 256), (512, 256, 1024), (512, 1024, 256), (256, 576, 1536), (256, 1536, 576)]
    {
        let (x, w) = (vec![numbers(rows, width); 2], numbers(width, gives));
        let whole = vec![Tensor::cat(x.clone(), 0)];
        let ways: Vec<Way<'_>> = vec![
            ("twice by a weight", captured((x, w.clone()), each)?),
            ("by a weight that is packed once", captured((whole, w), each)?),
        ];
        turns.take(&format!("packed {rows} x {width} x {gives}"), ways);
        let (dy, w) = (numbers(rows, width), numbers(gives, width));
        let turned = Tensor::from_data(w.clone().transpose().into_data(), &Device::flex());
        let ways: Vec<Way<'_>> = vec![
            (
                "by a transposed weight",
                captured((vec![dy.clone()], w), |(dy, w): Inputs| vec![dy[0].clone().matmul(w.transpose())])?,
            ),
            ("by one that was put the right way round before", captured((vec![dy], turned), each)?),
        ];
        turns.take(&format!("packed transposed {rows} x {width} x {gives}"), ways);
    }
    Ok(())
}

/// A step of a layer, and of those that read what it gives.
fn step<M: Module + 'static>(
    model: M,
    x: Tensor<3>,
    loss: impl Fn(&M, Tensor<3>) -> Tensor<1>,
) -> Result<Box<dyn FnMut()>, Error> {
    let mut executor = Executor::new(capture_step(&model, x.clone(), loss)?, CustomOps::new())?;
    Ok(Box::new(move || drop(black_box(executor.step(&model, x.clone()).expect("a step")))))
}

fn parts(turns: &mut Turns) -> Result<(), Error> {
    let device = Device::flex().autodiff();
    let squares = |parts: Vec<Tensor<3>>| {
        parts.into_iter().map(|part| part.powi_scalar(2).mean()).reduce(|a, b| a + b).expect("there are some")
    };
    for (rows, width, gives) in SHAPES {
        let layer = |gives| LinearConfig::new(width, gives).with_bias(false).init(&device);
        let x = Tensor::random([4, rows / 4, width], Distribution::Uniform(-1.0, 1.0), &device);
        let apart: (Linear, Vec<Linear>) = (layer(width), gives.iter().map(|gives| layer(*gives)).collect());
        let together: (Linear, Linear) = (layer(width), layer(gives.iter().sum()));
        let ways: Vec<Way<'_>> = vec![
            (
                "layers",
                step(apart, x.clone(), |(first, layers), x| {
                    let x = first.forward(x);
                    squares(layers.iter().map(|layer| layer.forward(x.clone())).collect())
                })?,
            ),
            (
                "one layer, read in parts",
                step(together, x, |(first, all), x| {
                    squares(all.forward(first.forward(x)).split_with_sizes(gives.to_vec(), 2))
                })?,
            ),
        ];
        turns.take(&format!("parts {rows} x {width} x {gives:?}"), ways);
    }
    Ok(())
}

/// Rows of the layers of a rank with several threads, down to those of a generation.
const FEW: [(usize, usize, &[usize]); 4] =
    [(64, 576, &[576, 192, 192]), (64, 576, &[1536, 1536]), (16, 576, &[576, 192, 192]), (16, 576, &[1536, 1536])];

fn threads(turns: &mut Turns) -> Result<(), Error> {
    let products = |(x, w): (Tensor<2>, Vec<Tensor<2>>)| w.into_iter().map(|w| x.clone().matmul(w)).collect::<Vec<_>>();
    for shape in SHAPES.into_iter().chain(FEW) {
        let (what, x, weights, _) = layers_of(shape);
        let each = weights.iter().map(|weight| captured((x.clone(), vec![weight.clone()]), products));
        let mut each = each.collect::<Result<Vec<_>, _>>()?;
        let inputs = (x, weights);
        let ways: Vec<Way<'_>> = vec![
            ("burn's products", forward(inputs.clone(), CustomOps::new().with_fusion(false), products)?),
            ("one by one", Box::new(move || each.iter_mut().for_each(|product| product()))),
            ("one operation", captured(inputs, products)?),
        ];
        turns.take(&format!("threads {what}"), ways);
    }
    Ok(())
}

type Table = fn(&mut Turns) -> Result<(), Error>;

/// Takes a table on a rank with so many threads.
fn on_rank(threads: usize, turns: &mut Turns, table: Table) -> Result<(), Error> {
    let turns = Mutex::new(turns);
    launch::threads(1).threads_per_rank(threads).run(|_| table(&mut turns.lock().expect("a turn")))?;
    Ok(())
}

fn main() -> Result<(), Error> {
    let arguments = figures::arguments();
    let rounds = arguments.iter().find_map(|word| word.parse().ok()).unwrap_or(15);
    let wanted = |name: &str| arguments.iter().all(|word| word == name || word.parse::<usize>().is_ok());
    let tables: [(&str, Table); 6] = [
        ("layers", layers),
        ("weights", weights),
        ("sum", sum),
        ("activation", activation),
        ("packed", packed),
        ("parts", parts),
    ];
    let mut turns = Turns { figures: Figures::of("products"), rounds, clock: clock::of_thread };
    for (name, table) in tables {
        if wanted(name) {
            on_rank(1, &mut turns, table)?;
        }
    }
    if wanted("threads") {
        turns.clock = clock::passed;
        on_rank(2, &mut turns, threads)?;
    }
    turns.figures.finish();
    Ok(())
}
