//! Which modules an adapter sits on, by the rules of PEFT.

use regex::Regex;

use crate::error::{Error, Reason, Result};

/// Longest pattern, and the memory that its automaton may take.
const MAX_PATTERN: usize = 1000;
const MAX_AUTOMATON: usize = 1 << 20;

/// A regular expression that must match all of a name.
pub fn whole(pattern: &str, field: &str) -> Result<Regex> {
    compile(&format!("^(?:{pattern})$"), pattern, field)
}

/// A key of a rank or alpha pattern: matches the end of a name from a dot on.
pub fn key(pattern: &str, field: &str) -> Result<Regex> {
    compile(&format!(r"^(?:.*\.)?(?:{pattern})$"), pattern, field)
}

fn compile(full: &str, pattern: &str, field: &str) -> Result<Regex> {
    let bad = |problem: String| {
        let shown: String = pattern.chars().take(80).collect();
        Error::option(field, format!("the regular expression '{shown}' {problem}"))
    };
    if pattern.len() > MAX_PATTERN {
        return Err(bad(format!("has more than {MAX_PATTERN} bytes")));
    }
    regex::RegexBuilder::new(full).size_limit(MAX_AUTOMATON).build().map_err(|e| {
        let why = e.to_string();
        let line = why.lines().last().unwrap_or_default().trim().to_owned();
        bad(format!("cannot be used ({line}); look-around is not known here"))
    })
}

#[derive(Debug, Clone)]
enum Names {
    List(Vec<String>),
    Pattern(Regex),
}

impl Names {
    fn match_module(&self, module: &str) -> bool {
        match self {
            Self::List(names) => names.iter().any(|name| ends_with(module, name)),
            Self::Pattern(pattern) => pattern.is_match(module),
        }
    }
}

/// Whether a module is called `name` or its name ends with a dot and `name`.
fn ends_with(module: &str, name: &str) -> bool {
    let rest = module.strip_suffix(name);
    !name.is_empty() && rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The choice of modules.
#[derive(Debug, Clone)]
pub struct Targets {
    /// None: all linears.
    include: Option<Names>,
    exclude: Option<Names>,
    layers: Vec<u32>,
    saved: Vec<String>,
}

/// What stands for all linears but the head.
pub const ALL_LINEAR: &str = "all-linear";

impl Targets {
    /// `usual` is taken where neither names nor a pattern are given; empty means all.
    pub fn new(
        names: &[String],
        pattern: &str,
        exclude: &[String],
        exclude_pattern: &str,
        layers: &[u32],
        saved: &[String],
        usual: &[&str],
    ) -> Result<Self> {
        if !pattern.is_empty() && !names.is_empty() {
            return Err(Error::option(
                "adapter.target_pattern",
                "give targets or a pattern, not both",
            ));
        }
        if !pattern.is_empty() && !layers.is_empty() {
            return Err(Error::option(
                "adapter.layers",
                "a target pattern says the layers itself; write them into it",
            ));
        }
        if !exclude_pattern.is_empty() && !exclude.is_empty() {
            return Err(Error::option(
                "adapter.exclude_pattern",
                "give names or a pattern to exclude, not both",
            ));
        }
        let all = |name: &String| name.eq_ignore_ascii_case(ALL_LINEAR);
        if names.len() > 1 && names.iter().any(all) {
            return Err(Error::option("adapter.targets", "all-linear stands alone"));
        }
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let include = if !pattern.is_empty() {
            Some(Names::Pattern(whole(pattern, "adapter.target_pattern")?))
        } else if names.is_empty() {
            (!usual.is_empty()).then(|| Names::List(owned(usual)))
        } else {
            (!names.iter().any(all)).then(|| Names::List(names.to_vec()))
        };
        let exclude = if exclude_pattern.is_empty() {
            (!exclude.is_empty()).then(|| Names::List(exclude.to_vec()))
        } else {
            Some(Names::Pattern(whole(exclude_pattern, "adapter.exclude_pattern")?))
        };
        Ok(Self { include, exclude, layers: layers.to_vec(), saved: saved.to_vec() })
    }

    /// Whether the linear module called `module` (without `.weight`) is adapted. What is excluded or
    /// trained whole never is.
    pub fn match_module(&self, module: &str) -> bool {
        if self.exclude.as_ref().is_some_and(|names| names.match_module(module)) {
            return false;
        }
        let parts: Vec<&str> = module.split('.').collect();
        let saved = |name: &String| {
            let wanted: Vec<&str> = name.split('.').collect();
            parts.windows(wanted.len()).any(|window| window == wanted)
        };
        if self.saved.iter().any(saved) {
            return false;
        }
        // A name that is given whole says the layer itself.
        if let Some(Names::List(names)) = &self.include
            && names.iter().any(|name| name == module)
        {
            return true;
        }
        let included = self.include.as_ref().is_none_or(|names| names.match_module(module));
        included
            && (self.layers.is_empty() || layer(module).is_some_and(|l| self.layers.contains(&l)))
    }

    /// The modules of `all` that match; an error that lists what there is when none does.
    pub fn choose<'a>(&self, all: impl Iterator<Item = &'a str> + Clone) -> Result<Vec<&'a str>> {
        let chosen: Vec<&str> = all.clone().filter(|module| self.match_module(module)).collect();
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        let mut near: Vec<&str> =
            all.clone().map(|module| module.rsplit('.').next().unwrap_or(module)).collect();
        near.sort_unstable();
        near.dedup();
        near.truncate(12);
        Err(Error::at(
            Reason::TensorNotFound,
            "adapter.targets",
            format!(
                "no linear of the model matches; their names end with {}, the first is '{}'",
                near.join(", "),
                all.clone().next().unwrap_or_default()
            ),
        ))
    }
}

/// The index of a module's layer: the first number between dots after two other parts.
fn layer(module: &str) -> Option<u32> {
    let parts: Vec<&str> = module.split('.').collect();
    let inner = parts.len().checked_sub(1)?;
    parts.iter().take(inner).skip(2).find_map(|part| {
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    fn list(include: &[&str]) -> Targets {
        Targets::new(&names(include), "", &[], "", &[], &[], &[]).unwrap()
    }

    fn pattern(pattern: &str) -> Targets {
        Targets::new(&[], pattern, &[], "", &[], &[], &[]).unwrap()
    }

    const Q3: &str = "model.layers.3.self_attn.q_proj";
    const UP13: &str = "model.layers.13.mlp.up_proj";
    const QUERY: &str = "encoder.layer.0.attention.self.query";

    /// Thirty cases; what PEFT's `check_target_module_exists` says was looked up for each.
    #[test]
    fn matches_as_peft_does() {
        let layers = |layers: &[u32]| {
            Targets::new(&names(&["q_proj", "up_proj"]), "", &[], "", layers, &[], &[]).unwrap()
        };
        let without = |exclude: &[&str], pattern: &str| {
            Targets::new(&names(&["all-linear"]), "", &names(exclude), pattern, &[], &[], &[])
                .unwrap()
        };
        let saved = |saved: &[&str]| {
            Targets::new(&names(&["all-linear"]), "", &[], "", &[], &names(saved), &[]).unwrap()
        };
        let table: [(Targets, &str, bool); 30] = [
            (list(&["q_proj"]), Q3, true),
            (list(&["q_proj"]), "q_proj", true),
            (list(&["proj"]), Q3, false),
            (list(&["self_attn.q_proj"]), Q3, true),
            (list(&["attn.q_proj"]), Q3, false),
            (list(&[Q3]), Q3, true),
            (list(&["3.self_attn.q_proj"]), Q3, true),
            (list(&["3.self_attn.q_proj"]), "model.layers.13.self_attn.q_proj", false),
            (list(&["k_proj", "q_proj"]), Q3, true),
            (list(&["Q_PROJ"]), Q3, false),
            (list(&["q_pro."]), Q3, false),
            (list(&[".q_proj"]), Q3, false),
            (list(&[""]), Q3, false),
            (list(&["query"]), QUERY, true),
            (list(&["self.query"]), QUERY, true),
            (list(&["ALL-linear"]), QUERY, true),
            (pattern(r".*\.q_proj"), Q3, true),
            (pattern("q_proj"), Q3, false),
            (pattern(r"model\.layers\.\d+\.self_attn\.[qv]_proj"), Q3, true),
            (pattern(r"model\.layers\.\d\..*"), UP13, false),
            (pattern(r".*(q_proj|up_proj)"), UP13, true),
            (layers(&[3]), Q3, true),
            (layers(&[3]), UP13, false),
            (layers(&[1, 13]), UP13, true),
            (layers(&[0]), "q_proj", true),
            (without(&["q_proj"], ""), Q3, false),
            (without(&["q_proj"], ""), UP13, true),
            (without(&[], r".*\.self_attn\..*"), Q3, false),
            (saved(&["mlp"]), UP13, false),
            (saved(&["ml"]), UP13, true),
        ];
        for (i, (targets, module, want)) in table.iter().enumerate() {
            assert_eq!(targets.match_module(module), *want, "case {i}: {module}");
        }
    }

    #[test]
    fn nothing_matched_lists_what_there_is() {
        let all = [Q3, UP13];
        let error = list(&["c_attn"]).choose(all.iter().copied()).unwrap_err();
        assert_eq!(error.reason(), Reason::TensorNotFound);
        assert!(error.message().contains("q_proj, up_proj"), "{error}");
        let usual = Targets::new(&[], "", &[], "", &[], &[], &["q_proj"]).unwrap();
        assert_eq!(usual.choose(all.iter().copied()).unwrap(), [Q3]);
    }

    #[test]
    fn patterns_that_cannot_be_used_are_refused() {
        let deep = "(a{1000}){1000}";
        for bad in ["(", "(?=x)y", "a{99999}", deep, &"a".repeat(2000)] {
            let error = Targets::new(&[], bad, &[], "", &[], &[], &[]).unwrap_err();
            assert_eq!(error.violations()[0].field, "adapter.target_pattern", "{bad}");
        }
        let (one, two) = (names(&["a"]), names(&["a", "all-linear"]));
        assert!(Targets::new(&one, "a", &[], "", &[], &[], &[]).is_err());
        assert!(Targets::new(&two, "", &[], "", &[], &[], &[]).is_err());
        assert!(Targets::new(&[], "a", &[], "", &[1], &[], &[]).is_err());
        assert!(Targets::new(&[], "", &one, "a", &[], &[], &[]).is_err());
        // As PEFT: a dot of a key fits any character, the whole end must fit.
        assert!(key("q_proj", "x").unwrap().is_match(Q3));
        assert!(!key("proj", "x").unwrap().is_match(Q3));
        assert!(key(r"layers\.[0-3]\..*q_proj", "x").unwrap().is_match(Q3));
    }
}
