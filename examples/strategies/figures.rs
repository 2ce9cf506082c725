//! Draws the curves as SVG: a line for each seed, a colour for each size.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

use crate::curves::{Curve, Point};

type Drawn = Result<(), Box<dyn Error>>;

const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 90, 181), RGBColor(220, 50, 32), RGBColor(0, 130, 90), RGBColor(140, 80, 160)];

/// A figure: its file, what it is of, and where a point lies.
struct Figure {
    file: &'static str,
    x: &'static str,
    y: &'static str,
    at: fn(&Point) -> Option<(f64, f64)>,
}

pub fn draw(curves: &[Curve], seq: usize, out: &Path) -> Drawn {
    let figures = [
        Figure { file: "loss-by-step.svg", x: "step", y: "loss, nats per byte", at: |p| Some((p.step as f64, p.loss)) },
        Figure { file: "loss-by-token.svg", x: "token", y: "loss, nats per byte", at: |p| Some((p.tokens, p.loss)) },
        Figure { file: "loss-by-second.svg", x: "second", y: "loss, nats per byte", at: |p| Some((p.seconds, p.loss)) },
        Figure {
            file: "noise-scale.svg",
            x: "tokens",
            y: "noise scale, rows",
            at: |p| p.noise.map(|noise| (p.tokens, noise)),
        },
    ];
    for Figure { file, x, y, at } in figures {
        let path = out.join(file);
        let root = SVGBackend::new(&path, (720, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let lines = lines(curves, at);
        if file == "noise-scale.svg" {
            let [xs, ys] = ranges(&lines, true);
            let chart = builder(&root, &format!("{y} (rows of {seq} bytes)")).build_cartesian_2d(xs, ys.log_scale())?;
            plot(chart, &lines, x, y)?;
        } else {
            let [xs, ys] = ranges(&lines, false);
            let chart = builder(&root, &format!("{y}, by {x}")).build_cartesian_2d(xs, ys)?;
            plot(chart, &lines, x, y)?;
        }
        root.present()?;
    }
    gap(curves, &out.join("generalisation-gap.svg"))
}

/// The gap of each run, by the rows of a step.
fn gap(curves: &[Curve], path: &Path) -> Drawn {
    let root = SVGBackend::new(path, (720, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let sizes = sizes(curves);
    let place = |rows: usize| sizes.iter().position(|size| *size == rows).unwrap_or(0);
    let points: Vec<(usize, f64)> =
        curves.iter().map(|curve| (place(curve.rows), curve.held_out - curve.learned)).collect();
    let (least, most) = bounds(points.iter().map(|point| point.1));
    let margin = (most - least).max(0.01) * 0.2;
    let mut chart = builder(&root, "loss on held-out text less loss on learned text, one point a seed")
        .build_cartesian_2d(-0.5..sizes.len() as f64 - 0.5, least - margin..most + margin)?;
    // One tick for each size, in the middle of its points.
    let name = |x: &f64| match x.fract() == 0.0 && *x >= 0.0 {
        true => sizes.get(*x as usize).map_or(String::new(), usize::to_string),
        false => String::new(),
    };
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(WHITE).x_desc("rows of a step").y_desc("gap, nats per byte").x_labels(2 * sizes.len() + 1);
    mesh.x_label_formatter(&name).y_labels(6).disable_x_mesh().draw()?;
    let colour = |place: usize| COLOURS[place % COLOURS.len()];
    let circle = |(place, gap): &(usize, f64)| Circle::new((*place as f64, *gap), 4, colour(*place).filled());
    chart.draw_series(points.iter().map(circle))?;
    root.present()?;
    Ok(())
}

struct Line {
    rows: usize,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
}

/// The rows of a step that there are curves of.
fn sizes(curves: &[Curve]) -> Vec<usize> {
    let mut sizes: Vec<usize> = curves.iter().map(|curve| curve.rows).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// A number without what does not tell anything.
fn short(number: &f64) -> String {
    match number.abs() {
        size if size >= 10_000.0 => format!("{:.0} 000", number / 1000.0),
        size if size >= 10.0 || size == 0.0 => format!("{number:.0}"),
        _ => format!("{number:.1}"),
    }
}

fn lines(curves: &[Curve], at: fn(&Point) -> Option<(f64, f64)>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for (place, rows) in sizes(curves).into_iter().enumerate() {
        let colour = COLOURS[place % COLOURS.len()];
        let of_size = curves.iter().filter(|curve| curve.rows == rows);
        lines.extend(of_size.map(|curve| Line { rows, colour, points: curve.points.iter().filter_map(at).collect() }));
    }
    lines
}

fn bounds(numbers: impl Iterator<Item = f64>) -> (f64, f64) {
    let (least, most) = numbers.fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
    if least <= most { (least, most) } else { (1.0, 2.0) }
}

fn ranges(lines: &[Line], log: bool) -> [Range<f64>; 2] {
    let points = || lines.iter().flat_map(|line| &line.points);
    let (_, right) = bounds(points().map(|point| point.0));
    let (low, high) = bounds(points().map(|point| point.1));
    let ys = if log {
        low.max(1e-3) / 1.3..high.max(2e-3) * 1.3
    } else {
        low - 0.05 * (high - low)..high + 0.05 * (high - low) + 1e-6
    };
    [0.0..right, ys]
}

fn builder<'a, 'b>(root: &'a DrawingArea<SVGBackend<'b>, Shift>, title: &str) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(root);
    builder.margin(12).caption(title, ("sans-serif", 16)).x_label_area_size(40).y_label_area_size(56);
    builder
}

fn plot<'a, 'b: 'a, Y>(
    mut chart: ChartContext<'a, SVGBackend<'b>, Cartesian2d<plotters::coord::types::RangedCoordf64, Y>>,
    lines: &[Line],
    x: &str,
    y: &str,
) -> Drawn
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(WHITE).x_desc(x).y_desc(y).x_labels(6).y_labels(6);
    mesh.x_label_formatter(&short).y_label_formatter(&short).draw()?;
    let mut named = Vec::new();
    for line in lines {
        let path = PathElement::new(line.points.clone(), line.colour.stroke_width(2));
        let drawn = chart.draw_series(std::iter::once(path))?;
        if !named.contains(&line.rows) {
            named.push(line.rows);
            let colour = line.colour;
            drawn
                .label(format!("{} rows a step", line.rows))
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}
