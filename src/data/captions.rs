//! What images are called in words: a name for each class, and templates that names are put into.

use crate::error::{Error, Result};

/// Stands for the name in a template.
pub const PLACE: &str = "{}";

/// Templates, at most, and bytes of one.
const MAX_TEMPLATES: usize = 64;
const MAX_TEMPLATE: usize = 256;

/// Names and templates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Captions {
    /// Of the classes, by their index.
    pub names: Vec<String>,
    /// Each holds [`PLACE`]; without any the name alone is the caption.
    pub templates: Vec<String>,
}

impl Captions {
    /// Captions of a class.
    pub fn each(&self) -> usize {
        self.templates.len().max(1)
    }

    /// The caption of `class` by a template, of which there are [`Captions::each`]. Empty for a class that has
    /// no name.
    pub fn text(&self, class: usize, template: usize) -> String {
        let name = self.names.get(class).map_or("", String::as_str);
        match self.templates.get(template) {
            Some(template) => template.replace(PLACE, name),
            None => name.to_owned(),
        }
    }
}

/// Refuses templates that make no captions.
///
/// # Errors
/// `INVALID_FIELD` for too many or too long ones, and for those without a place for the name.
pub fn check(templates: &[String]) -> Result<()> {
    if templates.len() > MAX_TEMPLATES {
        let problem = format!("{} templates; at most {MAX_TEMPLATES} are taken", templates.len());
        return Err(Error::field("templates", problem));
    }
    for (i, template) in templates.iter().enumerate() {
        let place = format!("templates[{i}]");
        if template.len() > MAX_TEMPLATE {
            let problem = format!("{} bytes; at most {MAX_TEMPLATE} are taken", template.len());
            return Err(Error::field(place, problem));
        }
        if !template.contains(PLACE) {
            let problem = format!(
                "'{template:.100}' has no {PLACE}, which the name of the class takes the place of"
            );
            return Err(Error::field(place, problem));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_take_their_places() {
        let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let mut captions = Captions { names: strings(&["cat", "dog"]), templates: Vec::new() };
        assert_eq!((captions.each(), captions.text(1, 0)), (1, "dog".to_owned()));
        captions.templates = strings(&["a {}.", "{} or {}"]);
        assert_eq!((captions.each(), captions.text(0, 1)), (2, "cat or cat".to_owned()));
        assert_eq!(captions.text(2, 0), "a .");
        assert!(check(&captions.templates).is_ok() && check(&[]).is_ok());
        for bad in [strings(&["a {}", "a cat"]), vec!["{}".repeat(200)], strings(&["{}"; 65])] {
            let error = check(&bad).unwrap_err();
            assert!(error.violations()[0].field.starts_with("templates"), "{error}");
        }
    }
}
