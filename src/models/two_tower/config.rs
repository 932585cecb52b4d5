//! The settings of a model of two towers, read from `config.json`, and the names of its tensors.

use serde_json::Value;

use crate::error::Result;
use crate::models::decoder::hugging_face::{Keys, MAX_PARAMETERS, refuse};

/// The family's name.
pub const FAMILY: &str = "two_tower";

/// The logarithm of the temperature, by which similarities are multiplied.
pub const TEMPERATURE: &str = "temperature";

const MAX_SIDE: usize = 1024;
const MAX_PATCHES: usize = 4096;
const MAX_POSITIONS: usize = 4096;
const MAX_WIDTH: usize = 1 << 14;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Image,
    Text,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Image, Self::Text];

    /// The first part of the names of its tensors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Text => "text",
        }
    }
}

/// Sizes of a tower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tower {
    /// Width of the states.
    pub hidden: usize,
    /// Channels inside of the feed-forward networks.
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    /// Rows of the position embeddings: patches of an image, or tokens of the longest caption.
    pub positions: usize,
}

impl Tower {
    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Products of a row of states with the weights of all blocks.
    pub fn products(&self) -> usize {
        self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate)
    }
}

/// Configuration of a model of two towers. Both are transformers with norms in front, over patches of an image
/// and over tokens of a caption; the mean of the last states is projected to `embedding` channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `model_type`: `two_tower`.
    pub architecture: String,
    pub image: Tower,
    pub text: Tower,
    /// Height and width of the images, and of a patch, which divides them.
    pub side: usize,
    pub patch: usize,
    /// Channels of the images.
    pub channels: usize,
    pub vocab: usize,
    /// Width of the common embeddings.
    pub embedding: usize,
    pub norm_eps: f32,
    /// What is taken from an image in [0, 1], and what the rest is divided by.
    pub mean: f32,
    pub deviation: f32,
}

/// Whether a configuration belongs to this family.
pub fn is_two_tower(config: &Value) -> bool {
    config.get("model_type").and_then(Value::as_str) == Some("two_tower")
}

impl Config {
    /// From `config.json`; every value is checked. Errors are `UNSUPPORTED_MODEL` and name the key.
    pub fn from_hugging_face(config: &Value) -> Result<Self> {
        if !is_two_tower(config) {
            return Err(refuse("model_type", "is not two_tower"));
        }
        let keys = Keys { map: config };
        let side = keys.size("image_size", Some(28), MAX_SIDE)?;
        let patch = keys.size("patch_size", Some(4), MAX_SIDE)?;
        if !side.is_multiple_of(patch) {
            let problem = format!("{patch} does not divide image_size, {side}");
            return Err(refuse("patch_size", problem));
        }
        let patches = (side / patch).pow(2);
        if patches > MAX_PATCHES {
            let problem = format!("makes {patches} patches of an image; at most {MAX_PATCHES}");
            return Err(refuse("patch_size", problem));
        }
        let positions = keys.size("max_position_embeddings", Some(64), MAX_POSITIONS)?;
        let this = Self {
            architecture: FAMILY.to_owned(),
            image: tower(&keys, "image", (160, 5), patches)?,
            text: tower(&keys, "text", (128, 5), positions)?,
            side,
            patch,
            channels: keys.size("num_channels", Some(1), 64)?,
            vocab: keys.size("vocab_size", None, 1 << 24)?,
            embedding: keys.size("embedding_size", Some(64), MAX_WIDTH)?,
            norm_eps: keys.number("layer_norm_eps", 1e-5, 1e-12..=0.1)? as f32,
            mean: keys.number("image_mean", 0.5, -1e3..=1e3)? as f32,
            deviation: keys.number("image_std", 0.5, 1e-6..=1e3)? as f32,
        };
        let elements = |(_, shape): (String, Vec<usize>)| -> u128 {
            shape.iter().map(|side| *side as u128).product()
        };
        if this.tensors().into_iter().map(elements).sum::<u128>() > MAX_PARAMETERS {
            let problem = "the model would have more than 2^40 weights";
            return Err(refuse("image_hidden_size", problem));
        }
        Ok(this)
    }

    pub fn tower(&self, side: Side) -> &Tower {
        match side {
            Side::Image => &self.image,
            Side::Text => &self.text,
        }
    }

    /// Elements of an image.
    pub fn pixels(&self) -> usize {
        self.side * self.side * self.channels
    }

    /// Elements of a patch.
    pub fn patch_pixels(&self) -> usize {
        self.patch * self.patch * self.channels
    }

    /// Names of the linear weights of a block, grouped by the input they share, in the order in which they run:
    /// query key value; output; up; down.
    pub fn linears(&self, side: Side, block: usize) -> [Vec<String>; 4] {
        let name = |part: &str| format!("{}.blocks.{block}.{part}.weight", side.name());
        [
            ["attention.query", "attention.key", "attention.value"].map(name).to_vec(),
            vec![name("attention.output")],
            vec![name("feed_forward.up")],
            vec![name("feed_forward.down")],
        ]
    }

    /// Every tensor the model must have, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        let (image, text) = (self.image.hidden, self.text.hidden);
        all.push(("image.patch.weight".to_owned(), vec![image, self.patch_pixels()]));
        all.push(("image.patch.bias".to_owned(), vec![image]));
        all.push(("text.tokens.weight".to_owned(), vec![self.vocab, text]));
        for side in Side::BOTH {
            let tower = self.tower(side);
            let (hidden, wide) = (tower.hidden, tower.intermediate);
            let mut add = |part: &str, shape: &[usize]| {
                all.push((format!("{}.{part}", side.name()), shape.to_vec()));
            };
            add("positions.weight", &[tower.positions, hidden]);
            for block in 0..tower.layers {
                for (part, rows, cols) in [
                    ("attention.query", hidden, hidden),
                    ("attention.key", hidden, hidden),
                    ("attention.value", hidden, hidden),
                    ("attention.output", hidden, hidden),
                    ("feed_forward.up", wide, hidden),
                    ("feed_forward.down", hidden, wide),
                ] {
                    add(&format!("blocks.{block}.{part}.weight"), &[rows, cols]);
                    add(&format!("blocks.{block}.{part}.bias"), &[rows]);
                }
                for norm in ["attention_norm", "feed_forward_norm"] {
                    add(&format!("blocks.{block}.{norm}.weight"), &[hidden]);
                    add(&format!("blocks.{block}.{norm}.bias"), &[hidden]);
                }
            }
            add("norm.weight", &[hidden]);
            add("norm.bias", &[hidden]);
            add("projection.weight", &[self.embedding, hidden]);
        }
        all.push((TEMPERATURE.to_owned(), vec![1]));
        all
    }
}

/// A tower whose widths are scaled by `width`; (usual width, usual layers).
fn tower(
    keys: &Keys<'_>,
    side: &str,
    (width, layers): (usize, usize),
    positions: usize,
) -> Result<Tower> {
    let key = |name: &str| format!("{side}_{name}");
    let by = keys.number("width", 1.0, 1e-3..=64.0)?;
    let heads = keys.size(&key("heads"), Some(4), 1024)?;
    let hidden = keys.size(&key("hidden_size"), Some(width), MAX_WIDTH)?;
    if !hidden.is_multiple_of(heads) {
        let problem = format!("{heads} does not divide {}, {hidden}", key("hidden_size"));
        return Err(refuse(&key("heads"), problem));
    }
    let wide = keys.size(&key("intermediate_size"), Some(4 * hidden), 4 * MAX_WIDTH)?;
    let scaled = |size: usize, of: usize, most: usize| {
        let whole = (size as f64 * by / of as f64).round() as usize;
        whole.clamp(1, (most / of).max(1)) * of
    };
    Ok(Tower {
        hidden: scaled(hidden, heads, MAX_WIDTH),
        intermediate: scaled(wide, 1, 4 * MAX_WIDTH),
        layers: keys.size(&key("layers"), Some(layers), 256)?,
        heads,
        positions,
    })
}
