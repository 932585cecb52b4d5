//! Stop strings: text is held back while it could still become one.

/// Watches text for stop strings.
pub struct Stops {
    strings: Vec<String>,
    held: String,
}

/// What may be shown after some text has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Shown {
    /// Text that no stop string can claim any more.
    Go(String),
    /// The text before a stop string; what follows is dropped.
    Stop(String),
}

impl Stops {
    /// Empty strings are ignored.
    pub fn new(mut strings: Vec<String>) -> Self {
        strings.retain(|s| !s.is_empty());
        Self { strings, held: String::new() }
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Shown {
        self.held.push_str(text);
        let first = self.strings.iter().filter_map(|s| self.held.find(s.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return Shown::Stop(std::mem::take(&mut self.held));
        }
        let keep = self.strings.iter().map(|s| open(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Shown::Go(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back, when nothing follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that `stop` starts with.
fn open(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len() - 1);
    (1..=most)
        .rev()
        .find(|n| stop.is_char_boundary(*n) && text.as_bytes().ends_with(&stop.as_bytes()[..*n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_is_never_shown_in_part() {
        let mut stops = Stops::new(vec!["###".to_owned(), "\nUser:".to_owned()]);
        assert_eq!(stops.push("hello #"), Shown::Go("hello ".to_owned()));
        assert_eq!(stops.push("1 and \nUs"), Shown::Go("#1 and ".to_owned()));
        assert_eq!(stops.push("e it"), Shown::Go("\nUse it".to_owned()));
        assert_eq!(stops.push("##"), Shown::Go(String::new()));
        assert_eq!(stops.push("# tail"), Shown::Stop(String::new()));
    }

    #[test]
    fn the_first_of_several_counts_and_held_text_comes_at_the_end() {
        let mut stops = Stops::new(vec!["b".to_owned(), "ab".to_owned(), String::new()]);
        assert_eq!(stops.push("xxa"), Shown::Go("xx".to_owned()));
        assert_eq!(stops.finish(), "a");
        assert_eq!(stops.push("xxab"), Shown::Stop("xx".to_owned()));
        let mut plain = Stops::new(Vec::new());
        assert_eq!(plain.push("é"), Shown::Go("é".to_owned()));
    }

    #[test]
    fn characters_are_not_cut() {
        let mut stops = Stops::new(vec!["éa".to_owned()]);
        assert_eq!(stops.push("xé"), Shown::Go("x".to_owned()));
        assert_eq!(stops.push("b"), Shown::Go("éb".to_owned()));
    }
}
