//! The text of a step, with what is to be warned of in its report.

use std::sync::Arc;

use super::report::Report;
use crate::calibrate::{Options, Sources, Windows};
use crate::error::Result;
use crate::methods::StepContext;
use crate::models::Model;
use crate::progress::Progress;

/// The calibration windows of a step.
///
/// # Errors
/// `DATASET_UNSUITABLE` for too little text, `MODEL_UNSUITABLE` for a data set without a tokenizer.
pub fn calibration(
    cx: &StepContext<'_>,
    model: &Model,
    options: &Options,
    report: &mut Report,
) -> Result<Arc<Windows>> {
    named(cx, model, options, ("calibration", cx.progress), report)
}

/// The windows of a text with its own stream of random numbers and its own place in the progress.
///
/// # Errors
/// As [`calibration`].
pub fn named(
    cx: &StepContext<'_>,
    model: &Model,
    options: &Options,
    (stream, progress): (&str, &Progress),
    report: &mut Report,
) -> Result<Arc<Windows>> {
    let stream = &cx.random.child(stream);
    let sources = Sources { model, texts: cx.texts, stream, progress };
    let windows = cx.calibrations.windows(options, cx.digest, &sources)?;
    windows.warnings.iter().for_each(|warning| report.warn(warning.clone()));
    Ok(windows)
}
