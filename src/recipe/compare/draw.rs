//! Drawing of a chart whose parts have their places: SVG elements, back to front.

use super::chart::{
    Axis, CIRCLE, Chart, DIAMOND, Drawn, KEY_ROW, LABEL_HEIGHT, Layout, Point, RIGHT, fitted,
};
use super::labels::{At, Line, Place};
use super::text::{escape, shorten, width};

/// Font sizes, in pixels.
const TITLE: f64 = 17.0;
const AXIS: f64 = 12.0;
pub const SMALL: f64 = 11.0;

// Okabe and Ito's colours, which people with any colour vision tell apart.
const BLUE: &str = "#0072b2";
const VERMILION: &str = "#d55e00";
const INK: &str = "#222222";
pub const GREY: &str = "#666666";
const GRID: &str = "#e4e4e4";

/// The grid, the frame and all text along it.
pub fn draw_axes(svg: &mut String, chart: &Chart, layout: &Layout) {
    let frame = &layout.frame;
    let (left, right, bottom) = (frame.x, frame.right(), frame.bottom());
    let title = shorten(&chart.title, TITLE, RIGHT - left);
    *svg += &text((left, 30.0), TITLE, "start", INK, &escape(&title));
    for tick in &layout.y_ticks {
        *svg += &line(((left, tick.at), (right, tick.at)), GRID, 1.0);
        *svg += &text((left - 7.0, tick.at + 4.0), SMALL, "end", INK, &tick.label);
    }
    for tick in &layout.x_ticks {
        *svg += &line(((tick.at, frame.y), (tick.at, bottom)), GRID, 1.0);
        *svg += &text((tick.at, bottom + 17.0), SMALL, "middle", INK, &tick.label);
    }
    *svg += &line(((left, frame.y), (left, bottom)), GREY, 1.0);
    *svg += &line(((left, bottom), (right, bottom)), GREY, 1.0);
    let middle = ((left + right) / 2.0, bottom + 39.0);
    *svg += &text(middle, AXIS, "middle", INK, &axis_label(&chart.x, frame.w));
    *svg += &format!(
        "<g transform=\"translate(20 {:.2}) rotate(-90)\">{}</g>\n",
        frame.y + frame.h / 2.0,
        text((0.0, 0.0), AXIS, "middle", INK, &axis_label(&chart.y, frame.h)).trim_end()
    );
}

/// The line along a front whose points are given by rising x. It runs through what is reached
/// already: between two points, the better x of the one comes with the worse y of the other.
pub fn staircase(corners: &[At], x_higher_is_better: bool) -> Vec<Line> {
    let steps = corners.windows(2).filter(|pair| pair[0] != pair[1]).flat_map(|pair| {
        let (a, b) = (pair[0], pair[1]);
        let corner = if x_higher_is_better { (a.0, b.1) } else { (b.0, a.1) };
        [(a, corner), (corner, b)]
    });
    steps.collect()
}

/// The front, the bars, the markers and their labels, in this order from back to front.
pub fn draw_points(svg: &mut String, layout: &Layout) {
    for part in &layout.front {
        *svg += &line(*part, BLUE, 1.3);
    }
    for (drawn, label) in layout.drawn.iter().zip(&layout.labels) {
        if let Some((low, high)) = drawn.bar {
            *svg += &line(((drawn.at.0, low), (drawn.at.0, high)), colour(drawn), 2.0);
        }
        if let Some(leader) = label.as_ref().and_then(|(_, place)| place.leader) {
            *svg += &line(leader, "#9a9a9a", 0.8);
        }
    }
    // The front last, so that what matters most is never hidden.
    for on_front in [false, true] {
        for drawn in layout.drawn.iter().filter(|d| d.on_front == on_front) {
            let Point { x, y, .. } = drawn.point;
            *svg += &format!(
                "<g><title>{} ({x}, {y})</title>{}</g>\n",
                escape(&drawn.name),
                marker(drawn.at, drawn.point.base, on_front)
            );
        }
    }
    for (drawn, label) in layout.drawn.iter().zip(&layout.labels) {
        if let Some((name, Place { label, .. })) = label {
            let at = (label.x + 1.0, label.y + LABEL_HEIGHT - 3.0);
            *svg += &text(at, SMALL, "start", ink(drawn), &escape(name));
        }
    }
}

/// What the markers mean, above the plot; only those that occur.
pub fn draw_legend(svg: &mut String, layout: &Layout) {
    let (mut x, y) = (layout.frame.x + 12.0, 53.0);
    let has = |test: fn(&Drawn) -> bool| layout.drawn.iter().any(test);
    let mut entry = |symbol: &dyn Fn(f64) -> String, name: &str| {
        *svg += &symbol(x);
        *svg += &text((x + 20.0, y + 4.0), SMALL, "start", INK, name);
        x += 20.0 + width(name, SMALL) + 32.0;
    };
    if has(|d| d.point.base) {
        entry(&|x| marker((x, y), true, true), "base");
    }
    let rule = |x: f64| line(((x - 12.0, y), (x + 12.0, y)), BLUE, 1.3);
    entry(&|x| rule(x) + &marker((x, y), false, true), "front");
    if has(|d| !d.point.base && !d.on_front) {
        entry(&|x| marker((x, y), false, false), "not on the front");
    }
    if has(|d| d.bar.is_some()) {
        entry(&|x| line(((x, y - 7.0), (x, y + 7.0)), GREY, 2.0), "range over seeds");
    }
    *svg += "\n";
}

/// What the numbers stand for, beside the plot.
pub fn draw_key(svg: &mut String, layout: &Layout) {
    let (x, mut y) = (layout.frame.right() + 34.0, layout.frame.y + 10.0);
    for (number, &i) in (1..).zip(&layout.key) {
        let drawn = &layout.drawn[i];
        let ink = ink(drawn);
        *svg += &text((x, y), SMALL, "end", ink, &i32::to_string(&number));
        *svg += &text((x + 8.0, y), SMALL, "start", ink, &escape(&fitted(&drawn.name)));
        y += KEY_ROW;
    }
    let rest = layout.drawn.len() - layout.key.len();
    if rest > 0 && !layout.key.is_empty() {
        *svg += &text((x + 8.0, y), SMALL, "start", GREY, &format!("and {rest} more"));
    }
}

/// The label of an axis with its better direction, no longer than `most` pixels, escaped. Along the
/// y axis the text runs upwards, so that the arrows point the right way there, too.
fn axis_label(axis: &Axis, most: f64) -> String {
    let hint = if axis.higher_is_better { "higher is better →" } else { "← lower is better" };
    let label = shorten(&axis.label, AXIS, most - width(hint, AXIS) - 20.0);
    format!("{}<tspan dx=\"14\" fill=\"{GREY}\">{hint}</tspan>", escape(&label))
}

/// The colour of a label.
fn ink(drawn: &Drawn) -> &'static str {
    match (drawn.point.base, drawn.on_front) {
        (true, _) => "#a84a00",
        (false, true) => INK,
        (false, false) => GREY,
    }
}

/// The colour of a bar.
fn colour(drawn: &Drawn) -> &'static str {
    match (drawn.point.base, drawn.on_front) {
        (true, _) => VERMILION,
        (false, true) => BLUE,
        (false, false) => GREY,
    }
}

/// A diamond for the base; a circle for arms, hollow off the front.
fn marker(at: At, base: bool, on_front: bool) -> String {
    let (x, y) = at;
    let r = CIRCLE - 0.7;
    if base {
        let (left, right, top, bottom) = (x - DIAMOND, x + DIAMOND, y - DIAMOND, y + DIAMOND);
        format!(
            "<path d=\"M{left:.2} {y:.2}L{x:.2} {top:.2}L{right:.2} {y:.2}L{x:.2} {bottom:.2}Z\" \
             fill=\"{VERMILION}\" stroke=\"#ffffff\" stroke-width=\"0.8\"/>"
        )
    } else {
        let (fill, stroke) = if on_front { (BLUE, BLUE) } else { ("#ffffff", GREY) };
        format!(
            "<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"{r}\" fill=\"{fill}\" stroke=\"{stroke}\" \
             stroke-width=\"1.4\"/>"
        )
    }
}

/// A straight line. Level and upright ones are put on whole pixels, where they are sharp.
pub fn line(line: Line, colour: &str, thickness: f64) -> String {
    let ((mut x, mut y), (mut to_x, mut to_y)) = line;
    if x == to_x {
        x = x.floor() + 0.5;
        to_x = x;
    }
    if y == to_y {
        y = y.floor() + 0.5;
        to_y = y;
    }
    format!(
        "<path d=\"M{x:.2} {y:.2}L{to_x:.2} {to_y:.2}\" stroke=\"{colour}\" \
         stroke-width=\"{thickness}\"/>\n"
    )
}

/// Text whose `content` is escaped, with a white rim that keeps it legible on lines.
pub fn text(at: At, size: f64, anchor: &str, ink: &str, content: &str) -> String {
    format!(
        "<text x=\"{:.2}\" y=\"{:.2}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{ink}\" \
         stroke=\"#ffffff\" stroke-width=\"2.5\" stroke-linejoin=\"round\" \
         paint-order=\"stroke\">{content}</text>\n",
        at.0, at.1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_is_drawn_through_what_is_reached() {
        // Lower is better in both: level to the next x first, then down to its y.
        let corners = [(0.0, 0.0), (10.0, 20.0)];
        assert_eq!(staircase(&corners, false)[0], ((0.0, 0.0), (10.0, 0.0)));
        assert_eq!(staircase(&corners, true)[0], ((0.0, 0.0), (0.0, 20.0)));
        assert!(staircase(&[(1.0, 1.0), (1.0, 1.0)], false).is_empty());
    }

    #[test]
    fn level_and_upright_lines_are_on_whole_pixels() {
        assert!(line(((1.2, 5.9), (9.8, 5.9)), GREY, 1.0).contains("M1.20 5.50L9.80 5.50"));
        assert!(line(((1.2, 5.9), (1.2, 8.0)), GREY, 1.0).contains("M1.50 5.90L1.50 8.00"));
        assert!(line(((1.2, 5.9), (2.0, 8.0)), GREY, 1.0).contains("M1.20 5.90L2.00 8.00"));
    }
}
