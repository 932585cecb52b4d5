//! The key-value pairs in front of a GGUF file.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::error::{Error, Reason, Result};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of one element type; typed, because a vocabulary has hundreds of thousands of elements.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    /// The type's name, for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) | Self::U16(_) | Self::U32(_) | Self::U64(_) => "unsigned integer",
            Self::I8(_) | Self::I16(_) | Self::I32(_) | Self::I64(_) => "integer",
            Self::F32(_) | Self::F64(_) => "float",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
        }
    }

    fn as_i128(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(v) => v.into(),
            Self::I8(v) => v.into(),
            Self::U16(v) => v.into(),
            Self::I16(v) => v.into(),
            Self::U32(v) => v.into(),
            Self::I32(v) => v.into(),
            Self::U64(v) => v.into(),
            Self::I64(v) => v.into(),
            _ => return None,
        })
    }
}

/// The metadata of a GGUF file, by key. Getters give `Ok(None)` for a missing key and an error for a
/// value of another type: a file that means something else must not be guessed at.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    /// Sets `key`, replacing an earlier value.
    pub fn set(&mut self, key: impl Into<String>, value: Value) {
        self.0.insert(key.into(), value);
    }

    /// Sets `key` unless it is set; false if it was.
    pub fn insert_new(&mut self, key: String, value: Value) -> bool {
        match self.0.entry(key) {
            std::collections::btree_map::Entry::Vacant(slot) => {
                slot.insert(value);
                true
            }
            std::collections::btree_map::Entry::Occupied(_) => false,
        }
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// Pairs in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// An integer of any width that is not negative.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer that is not negative", |v| {
            v.as_i128().and_then(|i| u64::try_from(i).ok())
        })
    }

    /// A finite number: a float, or an integer in its place.
    pub fn float(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a finite number", |v| {
            let x = match *v {
                Value::F32(x) => x,
                Value::F64(x) => x as f32,
                _ => v.as_i128()? as f32,
            };
            x.is_finite().then_some(x)
        })
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |v| match *v {
            Value::Bool(b) => Some(b),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of floats.
    pub fn floats(&self, key: &str) -> Result<Option<Cow<'_, [f32]>>> {
        self.typed(key, "an array of floats", |v| match v {
            Value::Array(Array::F32(a)) => Some(Cow::Borrowed(a.as_slice())),
            Value::Array(Array::F64(a)) => Some(a.iter().map(|x| *x as f32).collect()),
            _ => None,
        })
    }

    /// An array of integers of any width.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        fn widen<T: Copy + Into<i64>>(a: &[T]) -> Option<Vec<i64>> {
            Some(a.iter().map(|&x| x.into()).collect())
        }
        self.typed(key, "an array of integers", |v| match v {
            Value::Array(Array::U8(a)) => widen(a),
            Value::Array(Array::I8(a)) => widen(a),
            Value::Array(Array::U16(a)) => widen(a),
            Value::Array(Array::I16(a)) => widen(a),
            Value::Array(Array::U32(a)) => widen(a),
            Value::Array(Array::I32(a)) => widen(a),
            Value::Array(Array::I64(a)) => Some(a.clone()),
            Value::Array(Array::U64(a)) => a.iter().map(|&x| i64::try_from(x).ok()).collect(),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        get(value).map(Some).ok_or_else(|| {
            Error::new(
                Reason::MalformedFile,
                format!(
                    "metadata key '{key}' must be {wanted} but is a {} or out of range; convert the \
                     model again",
                    value.type_name()
                ),
            )
        })
    }
}

/// The error for a key that must be there.
pub fn missing(key: &str) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!("metadata key '{key}' is missing; convert the model again with a newer converter"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn getters_tell_missing_from_wrong() {
        let mut m = Metadata::default();
        m.set("n", Value::I32(-1));
        m.set("x", Value::F64(0.5));
        m.set("ids", Value::Array(Array::U64(vec![1, u64::MAX])));
        assert_eq!(m.unsigned("absent").unwrap(), None);
        assert!(m.unsigned("n").is_err());
        assert_eq!(m.float("n").unwrap(), Some(-1.0));
        assert_eq!(m.float("x").unwrap(), Some(0.5));
        assert!(m.text("x").is_err());
        assert!(m.integers("ids").is_err());
        m.set("x", Value::F32(f32::NAN));
        assert!(m.float("x").is_err());
    }
}
