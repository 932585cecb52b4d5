//! Scatter charts of a comparison, such as quality against bytes, as SVG and as PNG.
//!
//! The PNG is the SVG, rasterised. Labels stand beside their points while there is room; in a
//! denser chart points carry numbers, and a key beside the chart says what they stand for.

use super::draw::{GREY, SMALL, draw_axes, draw_key, draw_legend, draw_points, staircase, text};
use super::front::front;
use super::labels::{At, Line, Mark, Place, Rect, place};
use super::scale::{Scale, Tick, drawable};
use super::text::{FONT_FAMILY, escape, rasterise, shorten, width};
use crate::error::{Error, Result};

/// Size of the picture, in pixels.
const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 560.0;
/// Where the plot begins and ends; its left edge depends on the numbers on the y axis.
const TOP: f64 = 72.0;
const BOTTOM: f64 = 478.0;
pub(super) const RIGHT: f64 = 772.0;
/// Height of a label, in pixels.
pub(super) const LABEL_HEIGHT: f64 = 13.0;
/// The longest label beside a point and in the key, in pixels.
const LABEL_WIDTH: f64 = 150.0;
/// Space for the key of a dense chart and the height of its rows, in pixels.
const KEY: f64 = 190.0;
pub(super) const KEY_ROW: f64 = 15.0;
/// How near points must be to share a label in a dense chart, in pixels: the least that lets labels
/// stand clear of each other.
const SHARED: [f64; 6] = [4.0, 8.0, 16.0, 32.0, 64.0, WIDTH];
/// Half the width of the markers, in pixels.
pub(super) const CIRCLE: f64 = 4.5;
pub(super) const DIAMOND: f64 = 7.0;

/// What an axis shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// With its unit: `weights, MB`.
    pub label: String,
    pub higher_is_better: bool,
    /// Logarithmic; values that are not positive are then left out.
    pub log: bool,
}

/// One model of the comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    pub label: String,
    pub x: f64,
    pub y: f64,
    /// The lowest and highest `y` over seeds.
    pub spread: Option<(f64, f64)>,
    /// The model that the others were made from.
    pub base: bool,
}

/// A scatter chart, 800 by 560 pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub points: Vec<Point>,
}

/// A point that has a place in the picture.
pub(super) struct Drawn<'a> {
    pub point: &'a Point,
    pub name: String,
    pub at: At,
    /// Lower and upper end of the bar, in pixels.
    pub bar: Option<(f64, f64)>,
    pub on_front: bool,
}

/// Everything whose place is settled.
pub(super) struct Layout<'a> {
    pub frame: Rect,
    pub x_ticks: Vec<Tick>,
    pub y_ticks: Vec<Tick>,
    pub drawn: Vec<Drawn<'a>>,
    pub front: Vec<Line>,
    /// The text and place of each point's label.
    pub labels: Vec<Option<(String, Place)>>,
    /// The points that the numbers 1, 2, ... stand for; empty when points carry their names.
    pub key: Vec<usize>,
}

impl Chart {
    /// The chart as SVG, the same bytes for the same chart; an error when no point can be drawn.
    pub fn svg(&self) -> Result<String> {
        let layout = self.layout()?;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
             viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" font-family=\"{FONT_FAMILY}\">\n\
             <title>{}</title>\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n",
            escape(&self.title)
        );
        draw_axes(&mut svg, self, &layout);
        draw_points(&mut svg, &layout);
        draw_legend(&mut svg, &layout);
        draw_key(&mut svg, &layout);
        if let Some(note) = self.note() {
            let note = shorten(&note, SMALL, RIGHT - layout.frame.x);
            svg += &text((layout.frame.x, HEIGHT - 14.0), SMALL, "start", GREY, &escape(&note));
        }
        svg += "</svg>\n";
        Ok(svg)
    }

    /// The chart as PNG, 800 by 560 pixels; an error when no point can be drawn.
    pub fn png(&self) -> Result<Vec<u8>> {
        rasterise(&self.svg()?)
    }

    /// Whether a point has a place on both axes.
    fn drawable(&self, point: &Point) -> bool {
        drawable(point.x, self.x.log) && drawable(point.y, self.y.log)
    }

    /// Settles the place of everything.
    fn layout(&self) -> Result<Layout<'_>> {
        let points: Vec<&Point> = self.points.iter().filter(|p| self.drawable(p)).collect();
        if points.is_empty() {
            return Err(Error::field(
                "chart",
                "no point can be drawn; give at least one finite point, positive where an axis is \
                 logarithmic",
            ));
        }
        let bars = points.iter().filter_map(|p| p.spread).flat_map(|(low, high)| [low, high]);
        let heights = bars.filter(|&v| drawable(v, self.y.log)).chain(points.iter().map(|p| p.y));
        let y = Scale::new(heights, self.y.log, BOTTOM, TOP);
        let y_ticks = y.ticks(|_| if self.y.log { 16.0 } else { 30.0 });
        let widest = y_ticks.iter().map(|t| width(&t.label, SMALL)).fold(0.0, f64::max);
        let left = 48.0 + widest;
        let x = Scale::new(points.iter().map(|p| p.x), self.x.log, 0.0, 1.0);

        // With labels beside the points first, then with a key in their place.
        let spots: Vec<(f64, f64)> = points.iter().map(|p| (p.x, p.y)).collect();
        let best = front(&spots, self.x.higher_is_better, self.y.higher_is_better);
        let attempt = |shared: Option<f64>| {
            let right = if shared.is_some() { RIGHT - KEY } else { RIGHT };
            let frame = Rect { x: left, y: TOP, w: right - left, h: BOTTOM - TOP };
            let x = x.clone().over(left, right);
            let drawn: Vec<Drawn> =
                (0..points.len()).map(|i| draw(points[i], best.contains(&i), &x, &y)).collect();
            let corners: Vec<At> = best.iter().map(|&i| drawn[i].at).collect();
            let front = staircase(&corners, self.x.higher_is_better);
            let (key, names) = match shared {
                Some(distance) => numbers(&drawn, distance),
                None => (vec![], drawn.iter().map(|d| Some(fitted(&d.name))).collect()),
            };
            let (places, clear) = place_labels(&drawn, &front, &names, frame);
            let labels = names.into_iter().zip(places).map(|(n, p)| n.zip(p)).collect();
            let x_ticks = x.ticks(|label| width(label, SMALL) + 14.0);
            let y_ticks = y_ticks.clone();
            (Layout { frame, x_ticks, y_ticks, drawn, front, labels, key }, clear)
        };
        // No arrangement of more labels than the key has rows is legible.
        if points.len() <= key_rows() {
            let (layout, clear) = attempt(None);
            if clear {
                return Ok(layout);
            }
        }
        let mut last = attempt(Some(SHARED[0]));
        for distance in &SHARED[1..] {
            if last.1 {
                break;
            }
            last = attempt(Some(*distance));
        }
        Ok(last.0)
    }

    /// Says which points are left out.
    fn note(&self) -> Option<String> {
        let out: Vec<&Point> = self.points.iter().filter(|p| !self.drawable(p)).collect();
        let what = if out.iter().any(|p| p.base) { "point" } else { "arm" };
        let plural = if out.len() == 1 { "" } else { "s" };
        let names: Vec<String> = out.iter().map(|p| name(p)).collect();
        (!out.is_empty()).then(|| {
            format!("{} {what}{plural} outside the chart: {}", out.len(), names.join(", "))
        })
    }
}

/// What a point is called in the chart.
fn name(point: &Point) -> String {
    match (point.base, point.label.as_str()) {
        (true, "" | "base") => "base".to_owned(),
        (true, label) => format!("base: {label}"),
        (false, label) => label.to_owned(),
    }
}

fn draw<'a>(point: &'a Point, on_front: bool, x: &Scale, y: &Scale) -> Drawn<'a> {
    let known = point.spread.filter(|(low, high)| !low.is_nan() && !high.is_nan());
    let bar = known.map(|(low, high)| (y.at(low.min(high)), y.at(low.max(high))));
    Drawn { point, name: name(point), at: (x.at(point.x), y.at(point.y)), bar, on_front }
}

/// How many rows the key has room for.
fn key_rows() -> usize {
    ((BOTTOM - TOP) / KEY_ROW) as usize
}

/// A label as long as there is room for.
pub(super) fn fitted(name: &str) -> String {
    shorten(name, SMALL, LABEL_WIDTH)
}

/// Numbers for the points, from left to right: which point each number stands for, and the labels.
/// Points at most `distance` pixels apart share a label, `3–5`. When the key has too few rows for
/// all points, those off the front go without.
fn numbers(drawn: &[Drawn], distance: f64) -> (Vec<usize>, Vec<Option<String>>) {
    let mut kept: Vec<usize> = (0..drawn.len()).collect();
    if kept.len() > key_rows() {
        kept.sort_by_key(|&i| (!drawn[i].point.base, !drawn[i].on_front));
        // The last row says how many there are besides.
        kept.truncate(key_rows() - 1);
    }
    kept.sort_by(|&a, &b| drawn[a].at.0.total_cmp(&drawn[b].at.0).then(a.cmp(&b)));
    let near = |a: usize, b: usize| {
        let (a, b) = (drawn[a].at, drawn[b].at);
        (a.0 - b.0).hypot(a.1 - b.1) <= distance
    };
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for i in kept {
        match groups.iter_mut().find(|group| near(group[0], i)) {
            Some(group) => group.push(i),
            None => groups.push(vec![i]),
        }
    }
    let mut key = Vec::new();
    let mut labels = vec![None; drawn.len()];
    for group in groups {
        let first = key.len() + 1;
        let shown = group.iter().copied().find(|&i| drawn[i].on_front).unwrap_or(group[0]);
        key.extend(group);
        let last = key.len();
        labels[shown] =
            Some(if first == last { format!("{first}") } else { format!("{first}–{last}") });
    }
    (key, labels)
}

fn place_labels(
    drawn: &[Drawn],
    front: &[Line],
    names: &[Option<String>],
    frame: Rect,
) -> (Vec<Option<Place>>, bool) {
    let mark = |(drawn, name): (&Drawn, &Option<String>)| Mark {
        at: drawn.at,
        radius: if drawn.point.base { DIAMOND } else { CIRCLE },
        label: name.as_ref().map(|name| (width(name, SMALL) + 2.0, LABEL_HEIGHT)),
    };
    let marks: Vec<Mark> = drawn.iter().zip(names).map(mark).collect();
    let bars = drawn.iter().filter_map(|d| d.bar.map(|(a, b)| ((d.at.0, a), (d.at.0, b))));
    let lines: Vec<Line> = front.iter().copied().chain(bars).collect();
    place(&marks, &lines, frame.grown(-3.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(label: &str, log: bool) -> Axis {
        Axis { label: label.into(), higher_is_better: false, log }
    }

    fn point(label: &str, x: f64, y: f64) -> Point {
        Point { label: label.into(), x, y, spread: None, base: false }
    }

    fn chart(points: Vec<Point>) -> Chart {
        Chart {
            title: "Quality against bytes".into(),
            x: axis("weights, MB", false),
            y: axis("perplexity", true),
            points,
        }
    }

    /// A base and round-to-nearest and GPTQ at 8, 4, 3 and 2 bits.
    fn ladder() -> Chart {
        let arms = [
            ("rtn-8", 118.0, 28.0),
            ("gptq-8", 118.0, 28.0),
            ("rtn-4", 70.0, 36.0),
            ("gptq-4", 70.0, 31.0),
            ("rtn-3", 57.0, 150.0),
            ("gptq-3", 57.0, 55.0),
            ("rtn-2", 44.0, 200_000.0),
            ("gptq-2", 44.0, 2500.0),
        ];
        let mut points = vec![point("tiny-28m", 96.6, 28.0)];
        points[0].base = true;
        points.extend(arms.map(|(label, x, y)| point(label, x, y)));
        points[8].spread = Some((1700.0, 4100.0));
        chart(points)
    }

    /// `n` arms near to each other, with names of about 20 characters, and one far away.
    fn crowd(n: u32) -> Chart {
        let spot = |i: u32| (60.0 + f64::from(i * 7 % 11) * 4.0, 30.0 + f64::from(i * 5 % 7) * 9.0);
        let mut points: Vec<Point> = (0..n)
            .map(|i| point(&format!("wanda-50-then-gptq-{i}"), spot(i).0, spot(i).1))
            .collect();
        points.push(point("far away", 200.0, 120.0));
        let mut chart = chart(points);
        chart.y.log = false;
        chart
    }

    /// Width and height in a PNG's header.
    fn size(png: &[u8]) -> (u32, u32) {
        assert_eq!(&png[..16], b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
        assert!(png.ends_with(b"IEND\xae\x42\x60\x82"));
        let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().expect("4 bytes"));
        (number(16), number(20))
    }

    #[test]
    fn all_text_is_in_the_picture() {
        let chart = ladder();
        let svg = chart.svg().expect("svg");
        for point in &chart.points {
            assert!(svg.contains(&format!("{}</text>", point.label)), "{}", point.label);
        }
        for text in [
            ">Quality against bytes</text>",
            ">weights, MB<",
            ">perplexity<",
            "← lower is better",
            ">front</text>",
            ">base</text>",
            ">base: tiny-28m</text>",
            ">range over seeds</text>",
            "font-family=\"'DejaVu Sans', sans-serif\"",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("outside the chart"));
    }

    #[test]
    fn the_png_is_800_by_560_pixels_and_not_blank() {
        let png = ladder().png().expect("png");
        assert_eq!(size(&png), (800, 560));
        let crowded = crowd(5).png().expect("png");
        assert!(png.len() > 10_000 && png != crowded, "{} bytes", png.len());
    }

    #[test]
    fn the_same_chart_gives_the_same_bytes() {
        assert_eq!(ladder().svg().expect("svg"), ladder().svg().expect("svg"));
        assert_eq!(ladder().png().expect("png"), ladder().png().expect("png"));
    }

    #[test]
    fn labels_cannot_break_out_of_the_markup() {
        let hostile = "</text><script>alert('1')</script>&\"<!--\0\u{1b}";
        let mut chart = ladder();
        chart.title = hostile.into();
        chart.x.label = hostile.into();
        chart.y.label = hostile.into();
        for point in &mut chart.points {
            point.label = hostile.into();
        }
        chart.points[3].y = f64::NAN;
        let svg = chart.svg().expect("svg");
        assert!(!svg.contains("<script") && !svg.contains("<!--") && !svg.contains('\0'));
        assert!(svg.contains("&lt;script&gt;alert(&#39;1&#39;)"));
        assert_eq!(size(&chart.png().expect("still well formed")), (800, 560));
    }

    #[test]
    fn a_chart_without_points_is_an_error() {
        let error = chart(vec![]).svg().expect_err("empty");
        assert!(error.message().contains("no point can be drawn"));
        assert!(chart(vec![point("a", 1.0, 0.0), point("b", f64::NAN, 1.0)]).png().is_err());
    }

    #[test]
    fn single_and_equal_points_are_drawn() {
        for points in [vec![point("a", 5.0, 28.0)], vec![point("a", 0.0, 1.0); 8]] {
            let svg = chart(points).svg().expect("svg");
            assert!(svg.contains(">a</text>") && !svg.contains("NaN") && !svg.contains("inf"));
        }
    }

    #[test]
    fn points_without_a_place_are_counted_below_the_chart() {
        let mut chart = ladder();
        chart.points[7].y = f64::INFINITY;
        chart.points[3].y = 0.0;
        assert!(
            chart.svg().expect("svg").contains(">2 arms outside the chart: rtn-4, rtn-2</text>")
        );
        chart.points[3].y = 36.0;
        assert!(chart.svg().expect("svg").contains(">1 arm outside the chart: rtn-2</text>"));
        chart.points[0].x = f64::NAN;
        let note = ">2 points outside the chart: base: tiny-28m, rtn-2</text>";
        assert!(chart.svg().expect("svg").contains(note));
    }

    #[test]
    fn labels_of_thirteen_points_are_clear_of_each_other() {
        let chart = crowd(12);
        let layout = chart.layout().expect("layout");
        assert!(layout.key.is_empty());
        let places: Vec<Place> = layout.labels.iter().flatten().map(|(_, p)| *p).collect();
        assert_eq!(places.len(), 13);
        for (i, a) in places.iter().enumerate() {
            assert!(layout.frame.contains(&a.label));
            assert!(places[i + 1..].iter().all(|b| !a.label.overlaps(&b.label)), "label {i}");
        }
    }

    #[test]
    fn a_dense_chart_is_numbered_and_has_a_key() {
        let chart = crowd(26);
        let (svg, layout) = (chart.svg().expect("svg"), chart.layout().expect("layout"));
        assert_eq!(layout.key.len(), 27);
        for name in chart.points.iter().map(|p| &p.label) {
            assert!(svg.contains(&format!(">{name}</text>")), "{name}");
        }
        let places: Vec<Place> = layout.labels.iter().flatten().map(|(_, p)| *p).collect();
        for (i, a) in places.iter().enumerate() {
            assert!(places[i + 1..].iter().all(|b| !a.label.overlaps(&b.label)), "label {i}");
        }
        let many = crowd(200).svg().expect("svg");
        assert!(many.contains(">and 175 more</text>"));
    }

    #[test]
    fn equal_points_share_a_number() {
        let chart = chart(vec![point("a", 5.0, 28.0); 8]);
        let layout = chart.layout().expect("layout");
        let labels: Vec<&str> = layout.labels.iter().flatten().map(|(t, _)| t.as_str()).collect();
        assert_eq!((labels, layout.key.len()), (vec!["1–8"], 8));
    }

    #[test]
    fn spreads_that_are_odd_do_not_break_the_chart() {
        let mut chart = ladder();
        for (i, spread) in [(f64::NAN, 1.0), (0.0, 40.0), (50.0, 20.0), (1.0, f64::INFINITY)]
            .into_iter()
            .enumerate()
        {
            chart.points[i + 1].spread = Some(spread);
        }
        let svg = chart.svg().expect("svg");
        assert!(!svg.contains("NaN") && !svg.contains("\"inf"));
    }
}
