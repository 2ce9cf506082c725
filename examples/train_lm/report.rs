//! What a run tells at its end: a table and a JSON file.

use std::fs;
use std::io;
use std::path::Path;

use burn::module::Module;
use serde::Serialize;

use crate::args::Args;
use crate::common::batch::Batch;
use crate::common::figures::{Figures, Json as FiguresJson, row, table};
use crate::common::flags::count;
use crate::gpt::Gpt;

/// What came of a training.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The trained model, the same on every rank.
    pub model: Gpt,
    /// Losses in nats per byte, and what they took.
    pub figures: Figures,
    /// How large the batch was in the end, and how noisy the gradient.
    pub batch: Batch,
}

#[derive(Serialize)]
struct Json<'a> {
    #[serde(flatten)]
    figures: FiguresJson<'a>,
    rows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    noise_scale_rows: Option<f64>,
}

impl Outcome {
    /// Writes the outcome as JSON.
    pub fn write_json(&self, args: &Args, path: &Path) -> io::Result<()> {
        let json = Json {
            figures: self.figures.json(args.axes, self.model.num_params()),
            rows: self.batch.rows(),
            noise_scale_rows: self.batch.noise_rows().ok(),
        };
        fs::write(path, serde_json::to_string(&json)? + "\n")
    }

    /// The table that ends a run; `held_out` is the loss on text that was held out, if there was enough of it.
    pub fn summary(&self, args: &Args, held_out: Option<f64>) -> String {
        let Args { axes, layers, d_model, heads, steps, batch, seq, .. } = args;
        let parameters = self.model.num_params();
        let held_out = match held_out {
            Some(loss) => format!("{loss:.4} nats per byte"),
            None => "none: the text is too short".into(),
        };
        let mut rows = vec![
            row("ranks", axes.to_string()),
            row(
                "model",
                format!("{parameters} parameters: {}, width {d_model}, {heads} heads", count(*layers, "layer")),
            ),
        ];
        // Of a run that had all its steps behind it there is nothing to tell of them.
        if self.figures.steps > 0 {
            let (sizes, at_once) = (self.batch.sizes(*batch), count(args.rows_at_once(), "row"));
            let split = args.split(&self.batch);
            rows.extend([
                row(
                    "training",
                    format!("{} of {sizes} x {seq} bytes, at most {at_once} at once", count(*steps, "step")),
                ),
                row("batch", split.map_or_else(|why| why.to_string(), |split| split.to_string())),
                row("gradient noise scale", self.batch.advice(args.growth)),
            ]);
        }
        rows.extend(self.figures.losses("nats per byte"));
        rows.push(row("loss, held-out text", held_out));
        rows.extend(self.figures.costs(args.clip, *axes, &args.strategy));
        table(rows)
    }
}
