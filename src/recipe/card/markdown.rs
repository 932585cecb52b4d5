//! Text that comes from elsewhere, inside of Markdown.

/// One line: control characters, line ends among them, are spaces.
pub(super) fn line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Text that means nothing but itself.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in line(text).chars() {
        if "\\`*_[]<>|#~".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Text as code, inside of a line or of a table.
pub(super) fn code(text: &str) -> String {
    if text.is_empty() {
        return "none".to_owned();
    }
    format!("`{}`", line(text).replace('`', "'").replace('|', "\\|"))
}

/// Lines as a block of code behind `indent`, which nothing inside ends.
pub(super) fn fenced(language: &str, text: &str, indent: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(3.max(longest + 1));
    let mut out = format!("{indent}{fence}{language}\n");
    for line in text.lines() {
        out.push_str(&format!("{indent}{line}\n"));
    }
    out.push_str(&format!("{indent}{fence}\n"));
    out
}

/// A table; cells must be single lines.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut out = format!("| {} |\n|{}\n", header.join(" | "), "---|".repeat(header.len()));
    for row in rows {
        out.push_str(&format!("| {} |\n", row.join(" | ")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_breaks_out() {
        assert_eq!(plain("a\n# b | <script>"), "a \\# b \\| \\<script\\>");
        assert_eq!(code("a`b|c\r\nd"), "`a'b\\|c  d`");
        assert_eq!(code(""), "none");
        let block = fenced("json", "{\n\"a\": \"````\"\n}", "  ");
        assert_eq!(block, "  `````json\n  {\n  \"a\": \"````\"\n  }\n  `````\n");
        let table = table(&["a", "b"], &[vec!["1".into(), "2".into()]]);
        assert_eq!(table, "| a | b |\n|---|---|\n| 1 | 2 |\n");
    }
}
