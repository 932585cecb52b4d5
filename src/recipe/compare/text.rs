//! Text in pictures: its width, shortening and escaping, and the picture as PNG, all with one
//! embedded font, since servers have none.

use std::sync::{Arc, LazyLock};

use resvg::usvg::{Options, Tree, fontdb};
use resvg::{render, tiny_skia};
use skrifa::instance::{LocationRef, Size};
use skrifa::{FontRef, MetadataProvider};

use crate::error::{Error, Result};

/// Value of `font-family`: the embedded font, then whatever the reader's system has.
pub const FONT_FAMILY: &str = "'DejaVu Sans', sans-serif";

static FONTS: LazyLock<Arc<fontdb::Database>> = LazyLock::new(|| {
    let mut fonts = fontdb::Database::new();
    fonts.load_font_data(dejavu::sans::regular().to_vec());
    fonts.set_sans_serif_family("DejaVu Sans");
    Arc::new(fonts)
});

/// Width of `text` at `size` pixels, in pixels.
pub fn width(text: &str, size: f64) -> f64 {
    let Ok(font) = FontRef::new(dejavu::sans::regular()) else {
        return 0.7 * size * text.chars().count() as f64;
    };
    let (chars, metrics) =
        (font.charmap(), font.glyph_metrics(Size::new(size as f32), LocationRef::default()));
    // What the font lacks is drawn with another one, at most as wide as high in nearly every script.
    let advance = |c| chars.map(c).and_then(|glyph| metrics.advance_width(glyph)).map(f64::from);
    text.chars().map(|c| advance(c).unwrap_or(size)).sum()
}

/// `text` no wider than `most` pixels at `size` pixels. What is too long loses its middle, because
/// names of the same family differ at either end.
pub fn shorten(text: &str, size: f64, most: f64) -> String {
    let chars: Vec<char> = text.chars().collect();
    let cut = |kept: usize| {
        let head = kept.div_ceil(2);
        let (head, tail) = (&chars[..head], &chars[chars.len() - (kept - head)..]);
        head.iter().chain(&['…']).chain(tail).collect::<String>()
    };
    if width(text, size) <= most {
        return text.to_owned();
    }
    (0..chars.len()).rev().map(cut).find(|t| width(t, size) <= most).unwrap_or_else(|| cut(0))
}

/// `text` as content of an element or a quoted attribute; characters that XML forbids become
/// spaces.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push(' '),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The PNG of an SVG picture, at the picture's own size.
pub fn rasterise(svg: &str) -> Result<Vec<u8>> {
    let options = Options { fontdb: FONTS.clone(), ..Options::default() };
    let failed = |what: &str| Error::internal(format!("drawing the chart failed: {what}"));
    let tree = Tree::from_str(svg, &options).map_err(|e| failed(&e.to_string()))?;
    let size = tree.size().to_int_size();
    let mut pixels = tiny_skia::Pixmap::new(size.width(), size.height())
        .ok_or_else(|| failed("the picture has no size"))?;
    render(&tree, tiny_skia::Transform::identity(), &mut pixels.as_mut());
    pixels.encode_png().map_err(|e| failed(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_those_of_the_font() {
        // DejaVu Sans has 2048 units per em; 'i' is 569 wide and 'm' 1995.
        assert!((width("i", 2048.0) - 569.0).abs() < 1.0);
        assert!((width("mi", 2048.0) - 2564.0).abs() < 1.0);
        assert!(width("", 11.0).abs() < 1e-9);
    }

    #[test]
    fn long_text_loses_its_middle() {
        let long = "wanda-2of4-then-finetune-then-gptq-g64-4";
        let short = shorten(long, 11.0, 150.0);
        assert!(short.starts_with("wanda-2of4") && short.ends_with("gptq-g64-4"), "{short}");
        assert!(short.contains('…') && width(&short, 11.0) <= 150.0);
        assert_eq!(shorten("rtn-4", 11.0, 150.0), "rtn-4");
        assert_eq!(shorten("rtn-4", 11.0, 1.0), "…");
        assert_eq!(shorten("ééé漢漢漢漢漢漢", 10.0, 40.0), "éé…漢");
    }

    #[test]
    fn markup_and_control_characters_are_escaped() {
        assert_eq!(escape("<a & \"b\" 'c'>"), "&lt;a &amp; &quot;b&quot; &#39;c&#39;&gt;");
        assert_eq!(escape("a\0b\u{1b}c\n\u{ffff}"), "a b c  ");
    }

    #[test]
    fn a_picture_that_is_not_svg_is_an_error() {
        assert!(rasterise("<svg").is_err());
    }
}
