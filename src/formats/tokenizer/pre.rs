//! The ways to cut text before byte-level BPE, under the names GGUF gives them.

use serde_json::{Value, json};

/// One cut. Steps follow each other; each works inside the parts that the one before left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Every match is a part, and so is what lies between.
    Split(&'static str),
    /// Every digit is a part.
    Digits,
    /// The cut of GPT-2, then bytes as characters. Ends the steps.
    Gpt2Bytes,
    /// Bytes as characters. Ends the steps.
    Bytes,
}

/// A named way to cut, and what the models that use it have in common.
#[derive(Debug)]
pub struct Kind {
    /// Names in GGUF files; the first is written.
    pub names: &'static [&'static str],
    pub steps: &'static [Step],
    /// Whole parts that are tokens are taken before any merge.
    pub ignore_merges: bool,
    /// Text is brought into Unicode's form NFC first.
    pub nfc: bool,
    /// The start token goes in front unless the file says otherwise.
    pub add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Kind =
    Kind { names: &[], steps: &[], ignore_merges: false, nfc: false, add_bos: false };

/// Every kind that is read and written.
pub const KINDS: &[Kind] = &[
    Kind {
        names: &["gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion"],
        steps: &[Step::Gpt2Bytes],
        ..PLAIN
    },
    Kind {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        steps: &[Step::Digits, Step::Gpt2Bytes],
        ..PLAIN
    },
    Kind {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe"],
        steps: &[Step::Split(LLAMA3), Step::Bytes],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Kind {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        steps: &[Step::Split(QWEN2), Step::Bytes],
        nfc: true,
        ..PLAIN
    },
    Kind { names: &["stablelm2"], steps: &[Step::Split(QWEN2), Step::Bytes], ..PLAIN },
    Kind {
        names: &["tekken"],
        steps: &[Step::Split(TEKKEN), Step::Bytes],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Kind { names: &["gpt-4o", "llama4"], steps: &[Step::Split(GPT4O), Step::Bytes], ..PLAIN },
    Kind {
        names: &["default"],
        steps: &[
            Step::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Split(GPT2),
            Step::Split(r"\p{N}+"),
            Step::Split("[0-9][0-9][0-9]"),
            Step::Bytes,
        ],
        ..PLAIN
    },
];

impl Kind {
    /// The kind that GGUF files call `name`.
    pub fn named(name: &str) -> Option<&'static Self> {
        KINDS.iter().find(|kind| kind.names.contains(&name))
    }

    /// The kind of a `pre_tokenizer` and `normalizer` of tokenizer.json.
    pub fn detect(pre_tokenizer: &Value, normalizer: &Value) -> Option<&'static Self> {
        let nfc = match normalizer["type"].as_str() {
            None if normalizer.is_null() => false,
            Some("NFC") => true,
            _ => return None,
        };
        let steps = flatten(pre_tokenizer)?;
        let cuts_alike = |kind: &&Kind| {
            kind.steps.len() == steps.len()
                && kind.steps.iter().zip(&steps).all(|(own, seen)| own.is(seen))
        };
        // A model that cuts alike but normalises otherwise differs on rare text only.
        let alike: Vec<_> = KINDS.iter().filter(cuts_alike).collect();
        alike.iter().find(|kind| kind.nfc == nfc).or(alike.first()).copied()
    }

    /// The `pre_tokenizer` of tokenizer.json.
    pub fn pre_tokenizer(&self) -> Value {
        let steps: Vec<_> = self.steps.iter().map(|step| step.json()).collect();
        match steps.as_slice() {
            [one] => one.clone(),
            _ => json!({"type": "Sequence", "pretokenizers": steps}),
        }
    }
}

impl Step {
    fn json(self) -> Value {
        match self {
            Self::Split(regex) => json!({
                "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false
            }),
            Self::Digits => json!({"type": "Digits", "individual_digits": true}),
            Self::Gpt2Bytes | Self::Bytes => json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": self == Self::Gpt2Bytes
            }),
        }
    }

    /// Whether a step of a file does the same.
    fn is(self, json: &Value) -> bool {
        let same = |key: &str, otherwise: Value| {
            let own = self.json();
            *json.get(key).unwrap_or(&otherwise) == own[key]
        };
        let kind = same("type", Value::Null);
        match self {
            Self::Split(_) => {
                kind && same("pattern", Value::Null)
                    && same("behavior", Value::Null)
                    && same("invert", false.into())
            }
            Self::Digits => kind && same("individual_digits", false.into()),
            Self::Gpt2Bytes | Self::Bytes => {
                kind && same("add_prefix_space", true.into()) && same("use_regex", true.into())
            }
        }
    }
}

fn flatten(pre_tokenizer: &Value) -> Option<Vec<&Value>> {
    if pre_tokenizer["type"] != "Sequence" {
        return Some(vec![pre_tokenizer]);
    }
    let parts = pre_tokenizer["pretokenizers"].as_array()?;
    Some(parts.iter().map(flatten).collect::<Option<Vec<_>>>()?.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_recognised_from_what_it_writes() {
        for kind in KINDS {
            let normalizer = if kind.nfc { json!({"type": "NFC"}) } else { Value::Null };
            let found = Kind::detect(&kind.pre_tokenizer(), &normalizer).unwrap();
            assert_eq!(found.names, kind.names);
        }
    }

    #[test]
    fn defaults_and_nesting_do_not_hide_a_kind() {
        let bare = json!({"type": "ByteLevel", "add_prefix_space": false});
        assert_eq!(Kind::detect(&bare, &Value::Null).unwrap().names[0], "gpt-2");
        let nested = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}]},
            bare,
        ]});
        assert_eq!(Kind::detect(&nested, &Value::Null).unwrap().names[0], "smollm");
        let prefixed = json!({"type": "ByteLevel", "add_prefix_space": true});
        assert!(Kind::detect(&prefixed, &Value::Null).is_none());
    }
}
