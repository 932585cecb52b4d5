//! Axes of a chart: from values to pixels, and ticks that read as plain numbers.

/// Values beyond this (and, on log axes, below its inverse) are not drawn, so that no span overflows.
const LARGEST: f64 = 1e300;
/// Ticks per axis at most.
const MOST_TICKS: usize = 20;

/// Whether `value` has a place on an axis.
pub fn drawable(value: f64, log: bool) -> bool {
    value.abs() <= LARGEST && (!log || value >= LARGEST.recip())
}

/// A tick: its place in pixels and its number.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    pub at: f64,
    pub label: String,
}

/// One axis: a range of values, in powers of ten when `log`, laid over a range of pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    log: bool,
    low: f64,
    high: f64,
    /// No value is negative, so that no tick should be.
    positive: bool,
    from: f64,
    to: f64,
}

impl Scale {
    /// The scale on which all of `values` (each [`drawable`], at least one) lie between the pixels
    /// `from` and `to`, with some room at both ends.
    pub fn new(values: impl Iterator<Item = f64>, log: bool, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values {
            let value = if log { value.log10() } else { value };
            (low, high) = (low.min(value), high.max(value));
        }
        let positive = low >= 0.0;
        let size = low.abs().max(high.abs());
        let equal = if log { 1e-6 } else { (size * 1e-9).max(1e-290) };
        let room = match (high - low > equal, log) {
            (true, _) => (high - low) * 0.08,
            (false, true) => 0.1,
            (false, false) if size < 1e-290 => 1.0,
            (false, false) => size * 0.1,
        };
        Self { log, low: low - room, high: high + room, positive, from, to }
    }

    /// The same values over other pixels.
    pub fn over(mut self, from: f64, to: f64) -> Self {
        (self.from, self.to) = (from, to);
        self
    }

    /// Where `value` is, in pixels; values beyond the scale are at its ends.
    pub fn at(&self, value: f64) -> f64 {
        let value = if !self.log {
            value
        } else if value > 0.0 {
            value.log10()
        } else {
            self.low
        };
        let part = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.from + (self.to - self.from) * part
    }

    /// The finest ticks that fit: neighbours are at least `room(label)` pixels apart.
    ///
    /// Log axes are ticked at 1, 2 and 5 of each decade, or at whole decades when these are too
    /// many; an axis of less than a decade is ticked in even steps.
    pub fn ticks(&self, room: impl Fn(&str) -> f64) -> Vec<Tick> {
        let sets: Vec<Vec<(f64, f64)>> = if !self.log {
            even_steps(self.low, self.high)
        } else if self.high - self.low < 1.0 {
            even_steps(10f64.powf(self.low), 10f64.powf(self.high))
        } else {
            let decades =
                [1, 2, 3, 5, 10, 20, 50, 100].map(|every| self.decades(&[1.0], every)).into_iter();
            std::iter::once(self.decades(&[1.0, 2.0, 5.0], 1)).chain(decades).collect()
        };
        let mut coarsest = Vec::new();
        for set in sets {
            let ticks: Vec<Tick> = set
                .into_iter()
                .filter(|&(value, _)| !(self.positive && !self.log && value < 0.0))
                .map(|(value, step)| Tick { at: self.at(value), label: number(value, step) })
                .collect();
            let widest = ticks.iter().map(|t| room(&t.label)).fold(0.0, f64::max);
            let fits = ticks.windows(2).all(|pair| (pair[1].at - pair[0].at).abs() >= widest);
            if fits && ticks.len() <= MOST_TICKS {
                return ticks;
            }
            coarsest = ticks;
        }
        coarsest.truncate(1);
        coarsest
    }

    /// `(value, unit of its last digit)` at the given digits of every `every`th decade.
    fn decades(&self, digits: &[f64], every: i32) -> Vec<(f64, f64)> {
        let (low, high) = (self.low.floor() as i32, self.high.ceil() as i32);
        let decades = (low..=high).filter(|e| e.rem_euclid(every) == 0);
        decades
            .flat_map(|e| digits.iter().map(move |d| (d * 10f64.powi(e), 10f64.powi(e))))
            .filter(|(value, _)| (self.low..=self.high).contains(&value.log10()))
            .collect()
    }
}

/// Multiples of 1, 2, 2.5 or 5 times a power of ten between `low` and `high` with their step, one
/// set per step, the finest first.
fn even_steps(low: f64, high: f64) -> Vec<Vec<(f64, f64)>> {
    let finest = (high - low) / 12.0;
    let exponent = finest.log10().floor() as i32;
    let steps = (exponent..exponent + 3)
        .flat_map(|e| [1.0, 2.0, 2.5, 5.0].map(|digit| digit * 10f64.powi(e)))
        .filter(|&step| step >= finest);
    let set = |step: f64| {
        let first = (low / step).ceil();
        let count = ((high / step).floor() - first).clamp(-1.0, 12.0) + 1.0;
        (0..count as u32).map(|i| ((first + f64::from(i)) * step, step)).collect::<Vec<_>>()
    };
    steps.map(set).filter(|set| !set.is_empty()).collect()
}

/// `value`, a multiple of `step`, as a plain number; as `2×10¹²` when that would be too long.
fn number(value: f64, step: f64) -> String {
    // Powers of ten are not exact: 0.001 must not count as 0.000999.
    let exponent = (step.abs().log10() + 1e-9).floor() as i32;
    // 2.5 has one digit more than 1, 2 and 5.
    let digit = step / 10f64.powi(exponent);
    let decimals = (-exponent).max(0) as usize
        + usize::from(exponent <= 0 && (digit - digit.round()).abs() > 0.1);
    if value == 0.0 || (value.abs() < 1e9 && decimals <= 5) {
        return format!("{value:.decimals$}");
    }
    let digits = (value.abs().log10() - f64::from(exponent) + 1.5).clamp(0.0, 15.0) as usize;
    let short = format!("{value:.digits$e}");
    let (mantissa, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    let mantissa = if mantissa.contains('.') { mantissa.trim_end_matches('0') } else { mantissa };
    let exponent: String = exponent.chars().map(superscript).collect();
    match mantissa.trim_end_matches('.') {
        "1" => format!("10{exponent}"),
        mantissa => format!("{mantissa}×10{exponent}"),
    }
}

/// The raised form of a digit or a minus.
fn superscript(c: char) -> char {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    c.to_digit(10).map_or('⁻', |d| DIGITS[d as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64], log: bool, gap: f64) -> Vec<String> {
        let scale = Scale::new(values.iter().copied(), log, 0.0, 420.0);
        scale.ticks(|_| gap).into_iter().map(|t| t.label).collect()
    }

    #[test]
    fn linear_ticks_are_round_plain_numbers() {
        assert_eq!(labels(&[0.0, 100.0], false, 60.0), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(
            labels(&[0.61, 0.72], false, 60.0),
            ["0.62", "0.64", "0.66", "0.68", "0.70", "0.72"]
        );
        assert_eq!(labels(&[-3.0, 3.0], false, 100.0), ["-2", "0", "2"]);
    }

    #[test]
    fn values_that_are_not_negative_get_no_negative_tick() {
        assert_eq!(labels(&[0.0, 1000.0], false, 100.0)[0], "0");
    }

    #[test]
    fn log_ticks_are_at_one_two_and_five() {
        let ticks = labels(&[20.0, 500_000.0], true, 16.0);
        assert_eq!(ticks[..5], ["10", "20", "50", "100", "200"].map(String::from));
        assert_eq!(ticks.last().map(String::as_str), Some("1000000"));
        assert_eq!(labels(&[20.0, 500_000.0], true, 60.0)[..3], ["10", "100", "1000"]);
        assert_eq!(labels(&[0.02, 3.0], true, 20.0)[..3], ["0.02", "0.05", "0.1"]);
    }

    #[test]
    fn a_log_axis_of_less_than_a_decade_has_even_steps() {
        assert_eq!(labels(&[40.0, 120.0], true, 40.0), ["40", "60", "80", "100", "120"]);
    }

    #[test]
    fn equal_values_and_extremes_have_a_scale() {
        for value in [0.0, 28.0, -4.0, 1e12, 1e300, -1e300, 1e-300, 5e-324] {
            for log in [false, true] {
                if drawable(value, log) {
                    let scale = Scale::new([value, value].into_iter(), log, 0.0, 420.0);
                    assert!(
                        (scale.at(value) - 210.0).abs() < 1.0,
                        "{value} at {}",
                        scale.at(value)
                    );
                    assert!(scale.ticks(|_| 50.0).len() < 12, "{value}");
                }
            }
        }
        assert!(labels(&[-1e300, 1e300], false, 50.0).len() > 2);
        assert!(labels(&[1e-300, 1e300], true, 50.0).len() > 2);
        assert!(!drawable(f64::NAN, false) && !drawable(f64::INFINITY, false));
        assert!(!drawable(0.0, true) && !drawable(-1.0, true) && drawable(-1.0, false));
    }

    #[test]
    fn very_long_numbers_are_written_as_powers_of_ten() {
        assert_eq!(number(1e12, 1e12), "10¹²");
        assert_eq!(number(2e-7, 1e-7), "2×10⁻⁷");
        assert_eq!(number(1.25e10, 2.5e9), "1.25×10¹⁰");
        assert_eq!(number(500_000.0, 1e5), "500000");
        assert_eq!(number(7.5, 2.5), "7.5");
        assert_eq!(number(25.0, 25.0), "25");
    }
}
