//! Numbers as people read them.

use super::metrics;
use crate::proto::v1::Measurement;

/// A measured value with its unit.
pub fn measurement(m: &Measurement) -> String {
    value(&m.metric, &m.unit, m.value)
}

/// A value of a metric, with its unit.
#[allow(clippy::cast_possible_truncation)]
pub fn value(metric: &str, unit: &str, value: f64) -> String {
    match unit {
        _ if !value.is_finite() => "not a number".to_owned(),
        "bytes" => size(value as i64),
        // Perplexities are compared in their second decimal.
        _ if metric == metrics::PERPLEXITY.name && value < 9999.0 => format!("{value:.3}"),
        _ if metrics::metric(metric).is_ok_and(metrics::Metric::is_share) => {
            format!("{:.1}%", value * 100.0)
        }
        "" if value >= 1e6 => count(value as i64),
        "" => significant(value),
        "seconds" | "s" => seconds(value),
        unit => format!("{} {unit}", significant(value)),
    }
}

/// Bytes for people: `870 B`, `91.2 MB`, `1.40 GB` (powers of 1000).
#[allow(clippy::cast_precision_loss)]
pub fn size(bytes: i64) -> String {
    let mut value = bytes as f64;
    if value.abs() < 1000.0 {
        return format!("{bytes} B");
    }
    let mut unit = "";
    for next in ["kB", "MB", "GB", "TB", "PB"] {
        if value.abs() < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    format!("{} {unit}", significant(value))
}

/// Three significant digits, more for large numbers: `0.0123`, `4.57`, `91.2`, `1520`.
pub fn significant(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.9995 => format!("{value:.2}"),
        v if v >= 0.0995 => format!("{value:.3}"),
        v if v >= 1e-4 => format!("{value:.4}"),
        v if v.is_nan() => "not a number".to_owned(),
        _ => format!("{value:.1e}"),
    }
}

/// A count for people: `135 million`.
#[allow(clippy::cast_precision_loss)]
pub fn count(value: i64) -> String {
    match value as f64 {
        v if v >= 999.5e6 => format!("{} billion", significant(v / 1e9)),
        v if v >= 999.5e3 => format!("{} million", significant(v / 1e6)),
        _ => value.to_string(),
    }
}

/// Seconds for people: `0.8 s`, `42 s`, `3 min 20 s`.
pub fn seconds(value: f64) -> String {
    if value < 9.95 {
        format!("{value:.1} s")
    } else if value < 119.5 {
        format!("{value:.0} s")
    } else {
        let whole = value.round();
        format!("{:.0} min {:02.0} s", (whole / 60.0).floor(), whole % 60.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        let sizes = [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (91_234_567, "91.2 MB")];
        for (bytes, text) in sizes {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(size(999_999), "1.00 MB");
        assert_eq!(size(i64::MAX), "9223 PB");
        assert_eq!(seconds(0.84), "0.8 s");
        assert_eq!(seconds(200.4), "3 min 20 s");
        assert_eq!(significant(20.2104), "20.2");
        assert_eq!(significant(0.01234), "0.0123");
        assert_eq!(significant(1520.4), "1520");
    }

    #[test]
    fn counts_are_readable() {
        assert_eq!(count(134_515_008), "135 million");
        assert_eq!(count(7_000_000_000), "7.00 billion");
        assert_eq!(count(1_200), "1200");
    }

    #[test]
    fn values_have_units() {
        assert_eq!(value("perplexity", "", 28.0334), "28.033");
        assert_eq!(value("perplexity", "", 412_000.0), "412000");
        assert_eq!(value("top1_agreement", "", 0.794), "79.4%");
        assert_eq!(value("accuracy", "", 0.5), "50.0%");
        assert_eq!(value("weight_bytes", "bytes", 96.6e6), "96.6 MB");
        assert_eq!(value("decode_tokens_per_second", "tokens/s", 115.2), "115 tokens/s");
        assert_eq!(value("anything", "", f64::NAN), "not a number");
    }
}
