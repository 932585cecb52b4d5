//! Which weights a method touches: name patterns over the linear weights of the blocks.
//!
//! Embeddings, norms, biases and the output head are outside every scope, so that a tied head cannot
//! be changed by accident.

use crate::calibrate::walk;
use crate::error::{Error, Reason, Result};
use crate::models::Family;

/// The names in scope, in the order of the blocks. `patterns` may hold `*` for any characters; empty
/// means every linear weight inside the blocks. A pattern that matches nothing is TENSOR_NOT_FOUND.
pub fn names(family: &Family, patterns: &[String]) -> Result<Vec<String>> {
    let walk = walk::of(family);
    let all: Vec<String> =
        (0..walk.blocks()).flat_map(|b| walk.linears(b).into_iter().flatten()).collect();
    if patterns.is_empty() {
        return Ok(all);
    }
    for pattern in patterns {
        if !all.iter().any(|name| matches(pattern, name)) {
            let example = all.first().map_or("", String::as_str);
            return Err(Error::at(
                Reason::TensorNotFound,
                "scope",
                format!(
                    "'{pattern}' matches no linear weight inside the blocks; names look like \
                     '{example}', and '*' stands for any characters"
                ),
            ));
        }
    }
    Ok(all.into_iter().filter(|name| patterns.iter().any(|p| matches(p, name))).collect())
}

/// Whether the whole of `name` fits `pattern`. Linear in the product of the lengths at worst: on a
/// mismatch only the last star is tried again, which is enough since stars match greedily from the left.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, n));
            p += 1;
        } else if pattern.get(p) == Some(&name[n]) {
            (p, n) = (p + 1, n + 1);
        } else if let Some((at, taken)) = star {
            star = Some((at, taken + 1));
            (p, n) = (at + 1, taken + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        assert!(matches("*", "model.layers.0.mlp.up_proj.weight"));
        assert!(matches("*.q_proj.*", "model.layers.0.self_attn.q_proj.weight"));
        assert!(matches("a*b*c", "a-b-b-c"));
        assert!(matches("abc", "abc"));
        assert!(matches("abc**", "abc"));
        assert!(!matches("abc", "abcd"));
        assert!(!matches("*.1.*", "model.layers.0.weight"));
        assert!(!matches("", "a"));
        assert!(!matches("a*b", "a-c"));
    }

    #[test]
    fn hostile_patterns_end_soon() {
        assert!(!matches(&"*a".repeat(2000), &"a".repeat(1999)));
    }
}
