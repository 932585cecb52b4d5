//! Words of a text that nobody cut.

/// A word and where it stands, in characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    pub text: String,
    pub start: u32,
    pub end: u32,
}

/// Cuts a text at white space; a character of punctuation is a word of its own, except between letters or
/// digits (`don't`, `3.5`, `e-mail`).
pub fn split(text: &str) -> Vec<Word> {
    let chars: Vec<char> = text.chars().collect();
    let inner = |at: usize| {
        let side = |at: Option<usize>| at.and_then(|at| chars.get(at)).is_some_and(|c| letter(*c));
        side(at.checked_sub(1)) && side(at.checked_add(1))
    };
    let mut words = Vec::new();
    let mut start = None;
    let number = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
    let word = |from: usize, to: usize| Word {
        text: chars[from..to].iter().collect(),
        start: number(from),
        end: number(to),
    };
    for (at, c) in chars.iter().enumerate() {
        let whole = letter(*c) || matches!(c, '\'' | '’' | '.' | ',' | '-') && inner(at);
        if whole {
            start.get_or_insert(at);
            continue;
        }
        if let Some(start) = start.take() {
            words.push(word(start, at));
        }
        if !c.is_whitespace() && !c.is_control() {
            words.push(word(at, at + 1));
        }
    }
    if let Some(start) = start {
        words.push(word(start, chars.len()));
    }
    words
}

/// What words are made of: letters, digits, marks and whatever else is neither space nor ASCII punctuation.
fn letter(c: char) -> bool {
    c.is_alphanumeric() || !c.is_ascii() && !c.is_whitespace() && !c.is_control() && !mark(c)
}

/// Punctuation beyond ASCII.
fn mark(c: char) -> bool {
    matches!(c, '\u{a1}'..='\u{bf}' | '\u{2010}'..='\u{2027}' | '\u{2030}'..='\u{205e}' | '\u{3001}'..='\u{3003}'
        | '\u{3008}'..='\u{3011}' | '\u{ff01}'..='\u{ff0f}' | '\u{ff1a}'..='\u{ff20}')
        && !c.is_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_marks_have_their_places() {
        let cut = |text: &str| -> Vec<(String, u32, u32)> {
            split(text).into_iter().map(|w| (w.text, w.start, w.end)).collect()
        };
        let word = |text: &str, start, end| (text.to_owned(), start, end);
        assert_eq!(
            cut("  Don't stop (at 3.5)!"),
            [
                word("Don't", 2, 7),
                word("stop", 8, 12),
                word("(", 13, 14),
                word("at", 14, 16),
                word("3.5", 17, 20),
                word(")", 20, 21),
                word("!", 21, 22),
            ]
        );
        // Places count characters, not bytes.
        assert_eq!(
            cut("Zürich, „ja“"),
            [
                word("Zürich", 0, 6),
                word(",", 6, 7),
                word("„", 8, 9),
                word("ja", 9, 11),
                word("“", 11, 12),
            ]
        );
        assert_eq!(
            cut("e\u{301}té a\u{0}b"),
            [word("e\u{301}té", 0, 4), word("a", 5, 6), word("b", 7, 8),]
        );
        assert!(cut(" \n\t").is_empty() && cut("").is_empty());
        let text = "a-b c. d";
        let words = split(text);
        for w in &words {
            let part: String =
                text.chars().skip(w.start as usize).take((w.end - w.start) as usize).collect();
            assert_eq!(part, w.text);
        }
        assert_eq!(words.len(), 4);
    }
}
