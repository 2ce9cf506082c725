//! Draws the schedule of a pipeline: `cargo run --release --example schedules -- --help`.
//!
//! The grid goes to the terminal, and with `--svg` to a picture; under it stand the idle share and how many activations
//! each stage keeps alive.

#[path = "common/flags.rs"]
#[allow(dead_code, reason = "what other programs need of flags")]
mod flags;

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use burn_parallel::pipeline_parallel::schedule::{
    Action, Costs, Event, PeakActivations, Routes, Schedule, Simulation, StageCosts, Timetable,
};
use clap::{Parser, ValueEnum};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Draws who does what when in a pipeline, and says how long ranks have nothing to do.
#[derive(Parser, Debug)]
#[command(name = "schedules", max_term_width = 100)]
struct Flags {
    /// The schedule
    #[arg(long, value_enum, default_value = "1f1b")]
    schedule: Name,

    /// A timetable of one's own in place of a schedule: a line for each rank, actions as `2F0` between commas
    #[arg(long, value_name = "PATH", conflicts_with_all = ["schedule", "ranks", "micro_batches", "stages_per_rank"])]
    timetable: Option<PathBuf>,

    /// How many ranks there are
    #[arg(long, short = 'p', value_name = "P", default_value_t = 4, value_parser = up_to::<256>)]
    ranks: usize,

    /// Into how many micro-batches a batch is divided
    #[arg(long, short = 'm', value_name = "M", default_value_t = 8, value_parser = up_to::<4096>)]
    micro_batches: usize,

    /// How many stages each rank holds, with `interleaved` and `forward_only` [default: 2, 1]
    #[arg(long, short = 'v', value_name = "V", value_parser = up_to::<64>)]
    stages_per_rank: Option<usize>,

    /// How long a forward takes: one number, or one for each stage between commas
    #[arg(long, value_name = "TIME", default_value = "1", value_delimiter = ',', value_parser = time)]
    forward: Vec<f64>,

    /// How long the backward for the inputs takes, in the same way
    #[arg(long, value_name = "TIME", default_value = "1", value_delimiter = ',', value_parser = time)]
    backward_input: Vec<f64>,

    /// How long the backward for the weights takes, in the same way; a whole backward takes both
    #[arg(long, value_name = "TIME", default_value = "1", value_delimiter = ',', value_parser = time)]
    backward_weight: Vec<f64>,

    /// How long tensors travel from rank to rank
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = time)]
    communication: f64,

    /// Writes the timetable as well, with its sends and receives, in the format of --timetable
    #[arg(long)]
    actions: bool,

    /// Draws the grid as a picture, too
    #[arg(long, value_name = "PATH")]
    svg: Option<PathBuf>,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq)]
enum Name {
    Gpipe,
    #[value(name = "1f1b")]
    OneForwardOneBackward,
    Interleaved,
    #[value(name = "zb_h1")]
    ZeroBubbleH1,
    #[value(name = "forward_only")]
    ForwardOnly,
}

impl Flags {
    /// The timetable, or what is wrong with the flags.
    fn timetable(&self) -> Result<Timetable, String> {
        if let Some(path) = &self.timetable {
            return Timetable::read(path).map_err(|error| error.to_string());
        }
        let several = matches!(self.schedule, Name::Interleaved | Name::ForwardOnly);
        if let Some(stages) = self.stages_per_rank.filter(|stages| *stages > 1 && !several) {
            return Err(format!("--stages-per-rank {stages} is for --schedule interleaved or forward_only"));
        }
        let schedule = match self.schedule {
            Name::Gpipe => Schedule::GPipe,
            Name::OneForwardOneBackward => Schedule::OneForwardOneBackward,
            Name::Interleaved => Schedule::Interleaved { stages_per_rank: self.stages_per_rank.unwrap_or(2) },
            Name::ZeroBubbleH1 => Schedule::ZeroBubbleH1,
            Name::ForwardOnly => Schedule::ForwardOnly { stages_per_rank: self.stages_per_rank.unwrap_or(1) },
        };
        schedule.timetable(self.ranks, self.micro_batches).map_err(|error| error.to_string())
    }

    fn costs(&self, stages: usize) -> Result<Costs, String> {
        let of_stage = |times: &[f64], flag: &str, stage: usize| match times {
            [time] => Ok(*time),
            times if times.len() == stages => Ok(times[stage]),
            times => {
                Err(format!("{flag} has {} times, and there are {stages} stages; give 1 or {stages}", times.len()))
            }
        };
        let costs: Result<Vec<StageCosts>, String> = (0..stages)
            .map(|stage| {
                Ok(StageCosts::new(
                    of_stage(&self.forward, "--forward", stage)?,
                    of_stage(&self.backward_input, "--backward-input", stage)?,
                    of_stage(&self.backward_weight, "--backward-weight", stage)?,
                ))
            })
            .collect();
        Ok(Costs::per_stage(costs?).with_communication(self.communication))
    }
}

fn up_to<const MOST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=MOST).contains(&number) => Ok(number),
        _ => Err(format!("it must be a whole number from 1 to {MOST}")),
    }
}

fn time(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(time) if time.is_finite() && time >= 0.0 => Ok(time),
        _ => Err("it must be a number that is not negative".into()),
    }
}

fn main() -> ExitCode {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(help) if !help.use_stderr() => {
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(wrong) => return fail(2, &flags::one_line(&wrong)),
    };
    let chosen = flags.timetable().and_then(|timetable| {
        let costs = flags.costs(timetable.stages())?;
        Ok((timetable, costs))
    });
    match chosen {
        Err(wrong) => fail(2, &wrong),
        Ok((timetable, costs)) => match draw(&flags, &timetable, &costs) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => fail(1, &why.to_string()),
        },
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("schedules: {message}");
    ExitCode::from(code)
}

fn draw(flags: &Flags, timetable: &Timetable, costs: &Costs) -> Result<(), Box<dyn Error>> {
    let routes = Routes::chain(timetable.stages());
    let peak = timetable.validate(&routes)?;
    let simulation = timetable.simulate(&routes, costs)?;
    let mut text = simulation.grid();
    writeln!(text, "\n{}", summary(&simulation, &peak))?;
    if flags.actions {
        let full = if timetable.communicates() { timetable.clone() } else { timetable.with_communication(&routes)? };
        write!(text, "\n{full}")?;
    }
    if let Some(path) = &flags.svg {
        let picture = picture(&simulation)?;
        std::fs::write(path, picture).map_err(|why| format!("cannot write --svg {path:?}: {why}"))?;
    }
    match io::stdout().write_all(text.as_bytes()) {
        Err(why) if why.kind() != io::ErrorKind::BrokenPipe => Err(why.into()),
        _ => Ok(()),
    }
}

fn summary(simulation: &Simulation, peak: &PeakActivations) -> String {
    let list = |numbers: &[usize]| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    format!(
        "time               {}\nidle share         {:.3}\nlive activations   {} by stage, {} by rank",
        simulation.makespan,
        simulation.idle_share(),
        list(&peak.per_stage),
        list(&peak.per_rank),
    )
}

const ROW: i32 = 34;
const MARGIN: i32 = 12;
const NAMES: i32 = 64;

/// The grid as SVG: a bar for each action, as long as it takes.
fn picture(simulation: &Simulation) -> Result<String, Box<dyn Error>> {
    let shortest = simulation.events.iter().map(|event| event.end - event.start).filter(|time| *time > 0.0);
    let shortest = shortest.fold(f64::INFINITY, f64::min);
    // Wide enough for a label in the shortest bar, as long as the whole is not too wide to look at.
    let unit = if shortest.is_finite() { (30.0 / shortest).min(12_000.0 / simulation.makespan) } else { 1.0 };
    let at = |time: f64| NAMES + MARGIN + (time * unit).round() as i32;
    let ranks = simulation.busy.len() as i32;
    let (width, height) = (at(simulation.makespan) + MARGIN, ranks * ROW + 2 * MARGIN + 24);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let centred = Pos::new(HPos::Center, VPos::Center);
        let label = TextStyle::from(("sans-serif", 12).into_font()).pos(centred);
        let name = TextStyle::from(("sans-serif", 13).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
        for rank in 0..ranks {
            let (top, middle) = (MARGIN + rank * ROW, MARGIN + rank * ROW + ROW / 2);
            area.draw(&Text::new(format!("rank {rank}"), (MARGIN, middle), name.clone()))?;
            let row = [(at(0.0), top + 3), (at(simulation.makespan), top + ROW - 3)];
            area.draw(&Rectangle::new(row, RGBColor(240, 240, 240).filled()))?;
        }
        for Event { rank, action, start, end } in &simulation.events {
            let top = MARGIN + *rank as i32 * ROW;
            let bar = [(at(*start), top + 3), (at(*end), top + ROW - 3)];
            area.draw(&Rectangle::new(bar, colour(action).filled()))?;
            area.draw(&Rectangle::new(bar, WHITE.stroke_width(1)))?;
            let text = action.to_string();
            if bar[1].0 - bar[0].0 >= 7 * text.len() as i32 {
                let middle = ((bar[0].0 + bar[1].0) / 2, top + ROW / 2);
                area.draw(&Text::new(text, middle, label.clone()))?;
            }
        }
        let idle = format!("idle share {:.3}, time {}", simulation.idle_share(), simulation.makespan);
        area.draw(&Text::new(idle, (MARGIN, MARGIN + ranks * ROW + 14), name))?;
        area.present()?;
    }
    Ok(svg)
}

fn colour(action: &Action) -> RGBColor {
    match action {
        Action::Forward(_) => RGBColor(158, 202, 225),
        Action::Backward(_) => RGBColor(253, 190, 133),
        Action::BackwardInput(_) => RGBColor(253, 174, 107),
        Action::BackwardWeight(_) => RGBColor(161, 217, 155),
        Action::Send(..) | Action::Receive(..) => RGBColor(200, 200, 200),
    }
}
