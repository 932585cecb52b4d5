//! How the share of zeros grows (equation 1 of the paper).

use crate::error::{Error, Result};
use crate::proto::v1;

/// Updates of a run that pruning begins and ends after, as shares, where the options do not say.
const BEGIN: f64 = 0.1;
const END: f64 = 0.75;
/// Updates between masks, at least, and of a run at most, where the options do not say.
const LEAST: u64 = 10;
const MASKS: u64 = 100;

/// The share of zeros at every update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub initial: f64,
    pub last: f64,
    pub begin: u64,
    pub end: u64,
    pub frequency: u64,
    pub power: f64,
}

impl Schedule {
    /// From options and the updates of the run; `last` is the share at the end.
    ///
    /// # Errors
    /// `INVALID_OPTION` with the option.
    pub fn read(given: &v1::Gradual, last: f64, total: u64) -> Result<Self> {
        let share = |share: f64| (share * total as f64).round() as u64;
        let begin = given.begin_step.map_or(share(BEGIN), u64::from);
        let end = given.end_step.map_or(share(END).max(begin + 1).min(total), u64::from);
        let this = Self {
            initial: given.initial_sparsity.unwrap_or_default(),
            last,
            begin,
            end,
            frequency: given.frequency.map_or((total / MASKS).max(LEAST), u64::from),
            power: given.power.unwrap_or(3.0),
        };
        if end > total {
            let problem = format!("{end} is beyond the {total} updates of the run; lower it");
            return Err(Error::option("end_step", problem));
        }
        if begin >= end {
            let problem = format!("{begin} is not below end_step, {end}");
            return Err(Error::option("begin_step", problem));
        }
        Ok(this)
    }

    /// Checks what does not depend on the length of the run.
    ///
    /// # Errors
    /// `INVALID_OPTION` with the option.
    pub fn check(given: &v1::Gradual, last: f64) -> Result<()> {
        let initial = given.initial_sparsity.unwrap_or_default();
        if !(0.0..1.0).contains(&last) {
            return Err(Error::option("final_sparsity", format!("{last} is outside [0, 1)")));
        }
        if !(0.0..1.0).contains(&initial) {
            return Err(Error::option("initial_sparsity", format!("{initial} is outside [0, 1)")));
        }
        if last < initial {
            let problem = format!("{last} is less than initial_sparsity, {initial}");
            return Err(Error::option("final_sparsity", problem));
        }
        if given.frequency == Some(0) {
            return Err(Error::option("frequency", "0 updates between masks; give 1 or more"));
        }
        if let Some(power) = given.power
            && !(power > 0.0 && power <= 100.0)
        {
            return Err(Error::option("power", format!("{power} is outside (0, 100]")));
        }
        if let Some((begin, end)) = given.begin_step.zip(given.end_step)
            && begin >= end
        {
            let problem = format!("{begin} is not below end_step, {end}");
            return Err(Error::option("begin_step", problem));
        }
        let steps = given.training.as_ref().and_then(|training| training.steps);
        if let Some((end, steps)) = given.end_step.zip(steps)
            && end > steps
        {
            let problem = format!("{end} is beyond the {steps} updates of the run; lower it");
            return Err(Error::option("end_step", problem));
        }
        Ok(())
    }

    /// The share of zeros that is due after update `step`.
    pub fn target(&self, step: u64) -> f64 {
        // The ends are exact, not rounded.
        if step >= self.end {
            return self.last;
        }
        if step <= self.begin {
            return self.initial;
        }
        let done = step.saturating_sub(self.begin) as f64 / (self.end - self.begin) as f64;
        self.last + (self.initial - self.last) * (1.0 - done).powf(self.power)
    }

    /// Whether there are new masks after update `step`: every so often, and at the end in any case.
    pub fn due(&self, step: u64) -> bool {
        (self.begin..=self.end).contains(&step)
            && ((step - self.begin).is_multiple_of(self.frequency) || step == self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_and_the_middle_are_exact_and_it_never_falls() {
        let schedule =
            Schedule { initial: 0.1, last: 0.9, begin: 20, end: 120, frequency: 7, power: 3.0 };
        assert_eq!((schedule.target(20), schedule.target(120)), (0.1, 0.9));
        assert_eq!((schedule.target(0), schedule.target(1000)), (0.1, 0.9));
        // s_f + (s_i - s_f) / 8
        assert!((schedule.target(70) - (0.9 - 0.8 / 8.0)).abs() < 1e-12);
        assert!((0..200).all(|t| schedule.target(t) <= schedule.target(t + 1)));
        let due: Vec<u64> = (0..200).filter(|t| schedule.due(*t)).collect();
        assert_eq!((due[0], due[1], due.len()), (20, 27, 16));
        // The end is no multiple of the frequency and comes all the same.
        assert_eq!(due[due.len() - 2..], [118, 120]);
    }

    #[test]
    fn defaults_follow_the_length_of_the_run() {
        let read = |total| Schedule::read(&v1::Gradual::default(), 0.9, total).unwrap();
        let long = read(4000);
        assert_eq!((long.begin, long.end, long.frequency, long.power), (400, 3000, 40, 3.0));
        let short = read(100);
        assert_eq!((short.begin, short.end, short.frequency), (10, 75, 10));
        let tiny = read(1);
        assert_eq!((tiny.begin, tiny.end), (0, 1));
    }

    #[test]
    fn bad_options_are_named() {
        let field = |change: &dyn Fn(&mut v1::Gradual)| {
            let mut given = v1::Gradual {
                training: Some(v1::Training { steps: Some(100), ..Default::default() }),
                ..Default::default()
            };
            change(&mut given);
            let last = given.final_sparsity.unwrap_or(0.9);
            match Schedule::check(&given, last) {
                Err(error) => error.violations()[0].field.clone(),
                Ok(()) => match Schedule::read(&given, last, 100) {
                    Err(error) => error.violations()[0].field.clone(),
                    Ok(_) => String::new(),
                },
            }
        };
        assert_eq!(field(&|_| ()), "");
        assert_eq!(field(&|g| g.final_sparsity = Some(1.0)), "final_sparsity");
        assert_eq!(field(&|g| g.final_sparsity = Some(f64::NAN)), "final_sparsity");
        assert_eq!(field(&|g| g.initial_sparsity = Some(-0.1)), "initial_sparsity");
        assert_eq!(field(&|g| g.initial_sparsity = Some(0.95)), "final_sparsity");
        assert_eq!(field(&|g| g.frequency = Some(0)), "frequency");
        assert_eq!(field(&|g| g.power = Some(0.0)), "power");
        assert_eq!(field(&|g| g.end_step = Some(101)), "end_step");
        assert_eq!(field(&|g| (g.begin_step, g.end_step) = (Some(5), Some(5))), "begin_step");
        assert_eq!(field(&|g| g.begin_step = Some(100)), "begin_step");
        assert_eq!(field(&|g| g.end_step = Some(10)), "begin_step");
    }
}
