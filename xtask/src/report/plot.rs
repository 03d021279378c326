//! The report's plots, as SVG that stands inside a page.
//!
//! Each takes plain numbers and gives a picture with its own labels: a reader needs no legend to look back to. Colours
//! are those of [`PALETTE`] only, so that the page can give each another shade where the reader's screen is dark.

use super::page::{grouped, short};
use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::{
    Cartesian2d, ChartBuilder, ChartContext, Circle, DrawingArea, EmptyElement, IntoDrawingArea as _,
    IntoFont as _, IntoLogRange as _, LabelAreaPosition, PathElement, RGBColor, Ranged, Rectangle,
    SVGBackend, Text,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, TextStyle};

/// What is written and drawn in front.
const INK: RGBColor = RGBColor(0x1d, 0x23, 0x2f);
/// What explains.
const DIM: RGBColor = RGBColor(0x6a, 0x73, 0x82);
/// Lines behind everything.
const GRID: RGBColor = RGBColor(0xe4, 0xe7, 0xec);
/// This hypervisor.
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xd6);
/// More of its lines.
const OURS_TOO: [RGBColor; 2] = [RGBColor(0x1d, 0x8a, 0x80), RGBColor(0x7d, 0x5b, 0xc4)];
/// Others.
const THEIRS: RGBColor = RGBColor(0xe0, 0x8a, 0x2b);
/// More of theirs.
const THEIRS_TOO: RGBColor = RGBColor(0xb8, 0x95, 0x6c);
/// What guests share.
const SHARED: RGBColor = RGBColor(0xa9, 0xcb, 0xf3);

/// Every colour, and what it is on a dark screen.
pub(super) const PALETTE: [(RGBColor, &str); 9] = [
    (INK, "#e8ebf0"),
    (DIM, "#98a2b3"),
    (GRID, "#2b313c"),
    (OURS, "#5aa2ff"),
    (OURS_TOO[0], "#4fc3b7"),
    (OURS_TOO[1], "#b397f2"),
    (THEIRS, "#f0a651"),
    (THEIRS_TOO, "#a98c6b"),
    (SHARED, "#274b75"),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;

/// A line of a plot.
pub(super) struct Line {
    /// What it is, written at its end.
    pub(super) label: String,
    /// It is somebody else's.
    pub(super) theirs: bool,
    /// Each of its points has its number above it.
    pub(super) numbered: bool,
    /// Its points, from left to right.
    pub(super) points: Vec<(f64, f64)>,
}

/// Two figures of the same thing.
pub(super) struct Pair {
    /// What.
    pub(super) label: String,
    /// Here.
    pub(super) ours: u64,
    /// Elsewhere.
    pub(super) theirs: u64,
}

/// Draws on so many pixels; the picture's name is for those who do not see it.
fn drawn(name: &str, size: (u32, u32), paint: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        paint(&area)?;
        area.present()?;
    }
    Ok(svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", super::page::text(name)), 1))
}

fn style(color: RGBColor, size: u32, across: HPos, down: VPos) -> TextStyle<'static> {
    let font = ("sans-serif", size).into_font();
    TextStyle { font, color: color.to_backend_color(), pos: Pos::new(across, down) }
}

/// Writes beside a point.
fn write<X, Y>(
    chart: &Chart<'_, '_, X, Y>,
    at: (f64, f64),
    offset: (i32, i32),
    words: &str,
    style: TextStyle<'_>,
) -> Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    let element = EmptyElement::at(at) + Text::new(words.to_owned(), offset, style);
    Ok(chart.plotting_area().draw(&element)?)
}

/// A line from one point to another.
fn rule<X, Y>(chart: &Chart<'_, '_, X, Y>, ends: [(f64, f64); 2], color: RGBColor, width: u32) -> Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    Ok(chart.plotting_area().draw(&PathElement::new(ends.to_vec(), color.stroke_width(width)))?)
}

/// Lines over two scales of powers: a thing that grows is a slope, one that does not is level.
pub(super) fn lines(name: &str, lines: &[Line], (across, down): (&[(f64, &str)], &[f64])) -> Result<String> {
    let ((Some(left), Some(right)), (Some(low), Some(high))) =
        ((across.first(), across.last()), (down.first(), down.last()))
    else {
        anyhow::bail!("{name}: a plot without a scale")
    };
    let (left, right, low, high) = (left.0 / 1.15, right.0 * 1.15, *low, *high);
    drawn(name, (860, 420), |area| {
        let chart = ChartBuilder::on(area)
            .margin_top(18)
            .margin_right(230)
            .set_label_area_size(LabelAreaPosition::Left, 64)
            .set_label_area_size(LabelAreaPosition::Bottom, 34)
            .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())?;
        for &y in down {
            rule(&chart, [(left, y), (right, y)], GRID, 1)?;
            let number = format!("{y:.0}");
            let label = number.parse().map_or(number, short);
            write(&chart, (left, y), (-10, 0), &label, style(DIM, 13, HPos::Right, VPos::Center))?;
        }
        for &(x, label) in across {
            write(&chart, (x, low), (0, 10), label, style(DIM, 13, HPos::Center, VPos::Top))?;
        }
        let pixel = |line: &Line| line.points.last().map_or(0, |end| chart.backend_coord(end).1);
        let ends: Vec<i32> = lines.iter().map(pixel).collect();
        let mut theirs = [THEIRS, THEIRS_TOO].into_iter().cycle();
        let mut ours = [OURS].into_iter().chain(OURS_TOO).cycle();
        for ((line, end), label) in lines.iter().zip(&ends).zip(apart(&ends)) {
            let color = if line.theirs { theirs.next() } else { ours.next() }.unwrap_or(INK);
            let path =
                PathElement::new(line.points.clone(), color.stroke_width(if line.theirs { 2 } else { 3 }));
            chart.plotting_area().draw(&path)?;
            for &point in &line.points {
                chart.plotting_area().draw(&Circle::new(point, 4, color.filled()))?;
                if line.numbered {
                    let number = short(format!("{:.0}", point.1).parse()?);
                    write(&chart, point, (0, -9), &number, style(color, 12, HPos::Center, VPos::Bottom))?;
                }
            }
            if let Some(&last) = line.points.last() {
                let words = style(color, 14, HPos::Left, VPos::Center);
                write(&chart, last, (12, label - end), &line.label, words)?;
            }
        }
        Ok(())
    })
}

/// Where words go that belong at these heights, so that none stands on another.
fn apart(heights: &[i32]) -> Vec<i32> {
    const WORDS: i32 = 18;
    let mut order: Vec<usize> = (0..heights.len()).collect();
    order.sort_by_key(|&place| heights.get(place).copied());
    let mut places = heights.to_vec();
    let mut free = i32::MIN;
    for place in order {
        if let Some(height) = places.get_mut(place) {
            *height = (*height).max(free);
            free = *height + WORDS;
        }
    }
    places
}

/// Each pair as two bars over a scale of powers.
pub(super) fn bars(name: &str, pairs: &[Pair], (ours, theirs): (&str, &str)) -> Result<String> {
    const ROW: u32 = 46;
    const LEAST: f64 = 10.0;
    let rows = u32::try_from(pairs.len())?;
    let longest = pairs.iter().map(|pair| pair.theirs.max(pair.ours)).max().unwrap_or(1);
    let most = 10_f64.powf((longest as f64).log10().ceil());
    drawn(name, (860, rows * ROW + 44), |area| {
        let chart = ChartBuilder::on(area)
            .margin_top(6)
            .margin_right(90)
            .set_label_area_size(LabelAreaPosition::Left, 320)
            .set_label_area_size(LabelAreaPosition::Bottom, 34)
            .build_cartesian_2d((LEAST..most).log_scale(), f64::from(rows)..0.0)?;
        let mut tick = LEAST;
        while tick <= most * 1.01 {
            rule(&chart, [(tick, 0.0), (tick, f64::from(rows))], GRID, 1)?;
            let label = short(format!("{tick:.0}").parse()?);
            write(&chart, (tick, f64::from(rows)), (0, 10), &label, style(DIM, 13, HPos::Center, VPos::Top))?;
            tick *= 10.0;
        }
        for (row, pair) in (0_u32..).map(f64::from).zip(pairs) {
            let label = style(INK, 14, HPos::Right, VPos::Center);
            write(&chart, (LEAST, row + 0.5), (-14, 0), &pair.label, label)?;
            for (value, color, whose, from, to) in
                [(pair.ours, OURS, ours, 0.14, 0.48), (pair.theirs, THEIRS, theirs, 0.52, 0.86)]
            {
                let end = (value as f64).max(LEAST);
                let bar = Rectangle::new([(LEAST, row + from), (end, row + to)], color.filled());
                chart.plotting_area().draw(&bar)?;
                let label = style(color, 12, HPos::Left, VPos::Center);
                let words = format!("{} {whose}", grouped(value));
                write(&chart, (end, row + f64::midpoint(from, to)), (7, 0), &words, label)?;
            }
        }
        Ok(())
    })
}

/// A column for each of some things: a part below, and another on top of it.
pub(super) fn columns(name: &str, columns: &[(f64, f64)], unit: &str) -> Result<String> {
    /// More than these stand side by side without a gap.
    const FEW: usize = 64;
    let count = f64::from(u32::try_from(columns.len())?);
    let most = columns.iter().map(|(own, more)| own + more).fold(1.0, f64::max);
    drawn(name, (420, 240), |area| {
        let chart = ChartBuilder::on(area)
            .margin_top(18)
            .margin_right(10)
            .set_label_area_size(LabelAreaPosition::Left, 76)
            .set_label_area_size(LabelAreaPosition::Bottom, 26)
            .build_cartesian_2d(0.0..count, 0.0..most * 1.04)?;
        for y in scale(most) {
            rule(&chart, [(0.0, y), (count, y)], GRID, 1)?;
            let label = format!("{} {unit}", grouped(format!("{y:.0}").parse()?));
            write(&chart, (0.0, y), (-8, 0), &label, style(DIM, 12, HPos::Right, VPos::Center))?;
        }
        let gap = if columns.len() > FEW { 0.0 } else { 0.12 };
        for (x, &(own, more)) in (0_u32..).map(f64::from).zip(columns) {
            let (left, right, own, top) = (x + gap, x + 1.0 - gap, own, own + more);
            for (color, low, high) in [(OURS, 0.0, own), (SHARED, own, top)] {
                if high > low {
                    let bar = Rectangle::new([(left, low), (right, high)], color.filled());
                    chart.plotting_area().draw(&bar)?;
                }
            }
        }
        let label = style(DIM, 12, HPos::Center, VPos::Top);
        write(&chart, (count / 2.0, 0.0), (0, 8), &format!("{} guests", columns.len()), label)
    })
}

/// Round numbers from zero up to what is shown, four or five of them.
fn scale(most: f64) -> Vec<f64> {
    let power = 10_f64.powf((most / 4.0).log10().floor()).max(1.0);
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| most / step <= 5.0);
    let step = step.unwrap_or(most.max(1.0));
    (0_u32..).map(|n| f64::from(n) * step).take_while(|y| *y <= most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_round_and_ends_where_the_numbers_do() {
        assert_eq!(scale(130.0), [0.0, 50.0, 100.0]);
        assert_eq!(scale(1452.0), [0.0, 500.0, 1000.0]);
        assert_eq!(scale(1.0), [0.0, 1.0]);
        assert_eq!(scale(4096.0).len(), 5);
    }

    #[test]
    fn words_do_not_stand_on_each_other_and_keep_their_order() {
        assert_eq!(apart(&[300, 100, 200]), [300, 100, 200]);
        assert_eq!(apart(&[105, 100, 101]), [136, 100, 118]);
        assert!(apart(&[]).is_empty());
    }

    #[test]
    fn a_picture_has_no_colour_that_the_page_does_not_know() {
        let pair = Pair { label: "a < b".into(), ours: 129, theirs: 1298 };
        let line = |theirs| Line {
            label: "x".into(),
            theirs,
            numbered: true,
            points: vec![(64.0, 7e3), (128.0, 7e3)],
        };
        let pictures = [
            bars("bars", &[pair], ("here", "KVM")).unwrap(),
            lines(
                "lines",
                &[line(true), line(true), line(false)],
                (&[(64.0, "64"), (128.0, "128")], &[1e3, 1e6]),
            )
            .unwrap(),
            columns("columns", &[(3.0, 100.0), (5.0, 90.0)], "MiB").unwrap(),
        ];
        let known = PALETTE.map(|(RGBColor(r, g, b), _)| format!("#{r:02X}{g:02X}{b:02X}"));
        for picture in pictures {
            for color in picture.split('"').filter(|word| word.starts_with('#')) {
                assert!(known.iter().any(|known| known == color), "{color}");
            }
        }
    }
}
