//! The table of class names.

use std::collections::HashMap;

use serde_json::Value;

use super::Problem;
use crate::error::{Error, Result};

/// Classes of a data set.
const MAX_LABELS: usize = 10_000;
/// Bytes of a class name, and of all of them together, which must fit into a message.
const MAX_NAME: usize = 256;
const MAX_NAMES: usize = 1 << 20;

/// Names of the classes: given, or collected in the order in which they appear.
#[derive(Debug, Clone)]
pub struct Labels {
    names: Vec<String>,
    index: HashMap<String, u32>,
    bytes: usize,
    given: bool,
}

impl Labels {
    /// A table that grows with what appears.
    pub fn growing() -> Self {
        Self { names: Vec::new(), index: HashMap::new(), bytes: 0, given: false }
    }

    /// A table that is given.
    ///
    /// # Errors
    /// `INVALID_FIELD` (of `labels`) for blank, long, repeated or too many names.
    pub fn given(names: &[String]) -> Result<Self> {
        let mut labels = Self::growing();
        for (i, name) in names.iter().enumerate() {
            let name = name.trim();
            let added = labels.add(name).map_err(|what| (i, what));
            let added = match added {
                Ok(index) if (index as usize) < i => Err((i, format!("'{name}' stands twice"))),
                added => added,
            };
            added.map_err(|(i, what)| Error::field(format!("labels[{i}]"), what))?;
        }
        labels.given = true;
        Ok(labels)
    }

    /// The class that a value names: by its text, or, where the table is given, by its index from 0.
    pub fn class(&mut self, value: &Value) -> Result<u32, Problem> {
        let text = match value {
            Value::Null => return Err(Problem::Unusable("the label is null".into())),
            Value::String(text) => text.trim().to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Number(number) => match number.as_f64() {
                // Tables with gaps make whole numbers into fractions.
                Some(value) if value.fract() == 0.0 && value.abs() < 1e15 => {
                    format!("{value:.0}")
                }
                _ => number.to_string(),
            },
            Value::Array(list) => {
                return match list.as_slice() {
                    [one] if !one.is_array() => self.class(one),
                    list => Err(Problem::Unusable(format!(
                        "the number of labels is {}, but each record has one class; name another \
                         column",
                        list.len()
                    ))),
                };
            }
            Value::Object(_) => return Err(Problem::Wrong("the label is an object".into())),
        };
        if let Some(&class) = self.index.get(&text) {
            return Ok(class);
        }
        if text.is_empty() {
            return Err(Problem::Unusable("the label is blank".into()));
        }
        if !self.given {
            return self.add(&text).map_err(Problem::Wrong);
        }
        let index = text.parse().ok().filter(|index| (*index as usize) < self.names.len());
        index.ok_or_else(|| {
            Problem::Wrong(format!(
                "the label '{text:.60}' is none of the {} that are given, nor an index from 0",
                self.names.len()
            ))
        })
    }

    /// The names by index. Collected ones that are all whole numbers are put in their order, so that
    /// 0 is the first class whichever comes first in the file.
    pub fn into_names(mut self) -> Vec<String> {
        if !self.given {
            let numbers: Option<Vec<i64>> =
                self.names.iter().map(|name| name.parse().ok()).collect();
            if let Some(mut numbers) = numbers {
                numbers.sort_unstable();
                numbers.dedup();
                // "1" and "01" stay two names.
                if numbers.len() == self.names.len() {
                    self.names = numbers.iter().map(ToString::to_string).collect();
                }
            }
        }
        self.names
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    fn add(&mut self, name: &str) -> Result<u32, String> {
        if let Some(&index) = self.index.get(name) {
            return Ok(index);
        }
        if name.is_empty() {
            return Err("the name is blank".into());
        }
        if name.len() > MAX_NAME {
            return Err(format!(
                "the label '{name:.40}...' has {} bytes, more than {MAX_NAME}; is it the right column?",
                name.len()
            ));
        }
        self.bytes += name.len();
        if self.names.len() == MAX_LABELS || self.bytes > MAX_NAMES {
            return Err(format!(
                "more than {MAX_LABELS} labels, or more than {MAX_NAMES} bytes of them; is it the \
                 right column?"
            ));
        }
        let index = self.names.len() as u32;
        self.names.push(name.to_owned());
        self.index.insert(name.to_owned(), index);
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Reason;

    fn collect(values: &[Value]) -> Result<Vec<String>, Problem> {
        let mut labels = Labels::growing();
        for value in values {
            labels.class(value)?;
        }
        Ok(labels.into_names())
    }

    #[test]
    fn names_keep_their_order_and_numbers_are_sorted() {
        assert_eq!(collect(&[json!("b"), json!(" a "), json!("b")]).unwrap(), ["b", "a"]);
        assert_eq!(
            collect(&[json!(10), json!("2"), json!(-1), json!(2.0)]).unwrap(),
            ["-1", "2", "10"]
        );
        assert_eq!(collect(&[json!("1"), json!("x"), json!(0)]).unwrap(), ["1", "x", "0"]);
        assert_eq!(collect(&[json!("1"), json!("01")]).unwrap(), ["1", "01"]);
        assert_eq!(collect(&[json!(true), json!(["false"])]).unwrap(), ["true", "false"]);
        assert_eq!(collect(&[json!(0.5)]).unwrap(), ["0.5"]);
    }

    #[test]
    fn given_names_are_found_by_name_and_by_index() {
        let mut labels = Labels::given(&["no".into(), "yes".into()]).unwrap();
        for (value, class) in [(json!("yes"), 1), (json!("no"), 0), (json!(1), 1), (json!("0"), 0)]
        {
            assert_eq!(labels.class(&value).unwrap(), class, "{value}");
        }
        for value in [json!("maybe"), json!(2), json!(-1), json!(0.5)] {
            assert!(matches!(labels.class(&value), Err(Problem::Wrong(_))), "{value}");
        }
        // Names that are numbers go before indices.
        let mut labels = Labels::given(&["1".into(), "0".into()]).unwrap();
        assert_eq!(labels.class(&json!(1)).unwrap(), 0);
        assert_eq!(labels.into_names(), ["1", "0"]);
        for names in [&["a", "a"][..], &[" "], &["x".repeat(257).as_str()]] {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let error = Labels::given(&names).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidField);
            assert!(error.violations()[0].field.starts_with("labels["), "{error}");
        }
    }

    #[test]
    fn tables_are_bounded_and_lists_are_refused() {
        let mut labels = Labels::growing();
        for i in 0..MAX_LABELS {
            labels.class(&json!(format!("class {i}"))).unwrap();
        }
        assert!(matches!(labels.class(&json!("one more")), Err(Problem::Wrong(_))));
        assert_eq!(labels.class(&json!("class 7")).unwrap(), 7);
        assert_eq!(labels.len(), MAX_LABELS);
        for value in [json!(null), json!([1, 2]), json!([]), json!(""), json!([[1]])] {
            assert!(
                matches!(collect(std::slice::from_ref(&value)), Err(Problem::Unusable(_))),
                "{value}"
            );
        }
        assert!(matches!(collect(&[json!({"a": 1})]), Err(Problem::Wrong(_))));
    }
}
