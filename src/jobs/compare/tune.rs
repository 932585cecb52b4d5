//! The arms of a comparison that tune: trained as an adaptation is, measured as it would be stored, and kept
//! only where that was asked for.

use super::super::evaluate::Adapted;
use super::super::memory::Peak;
use super::super::tuning::{self, Keep};
use super::{Made, Place, SAVED_BASE, Work};
use crate::error::{Error, Result};
use crate::eval;
use crate::eval::metrics::{FORGETTING, PERPLEXITY};
use crate::models::AnyModel;
use crate::progress::Progress;
use crate::proto::v1::{self, KeepVersions};
use crate::recipe::{adapt, compare};
use crate::seed::Stream;
use crate::store::names;

impl Work<'_> {
    /// Trains what run number `index` tunes of a model, and measures it.
    pub(super) fn tune(
        &self,
        run: &mut v1::ArmRun,
        (index, tuning): (usize, &v1::Tuning),
        (made, model): (&Made, &AnyModel),
        base: Option<eval::Base<'_>>,
        progress: &Progress,
    ) -> Result<()> {
        let (job, seed) = (self.job, run.seed.unwrap_or_default());
        let arm = self.comparison.arms.iter().find(|arm| arm.name == run.arm);
        let options = arm.and_then(|arm| compare::evaluation_of(self.comparison, arm));
        let within = |e: Error| e.within(&format!("comparison: arm {}, seed {seed}", run.arm));
        let plan = adapt::Plan::new(
            tuning.adaptation.as_ref(),
            tuning.training.as_ref(),
            (model.family(), model.config()),
        )
        .map_err(within)?;
        let mut model = model.clone();
        let prepared = plan.method()?.prepare(model.weights_mut(), &plan.shapes).map_err(within)?;
        let model = &model;
        // As an adaptation with this seed alone would have it.
        let random = Stream::root(seed).child("adapt");
        let peak = Peak::start(job.handle);
        let data = tuning::Data::read(job, model, &plan, &random, progress).map_err(within)?;
        let kept = job.kept.join(format!("run {index}"));
        std::fs::create_dir_all(&kept)?;
        let training = progress.part(0.0, 0.8);
        let weights_digest = made.weights_digest();
        let work = tuning::Work {
            job,
            plan: &plan,
            model,
            digest: &made.digest,
            weights_digest: &weights_digest,
            data: &data,
            random: &random,
            kept: &kept,
            progress: &training,
        };
        let mut trained = work.train().map_err(within)?;
        trained.report.warnings.extend(prepared);
        let peak_bytes = peak.bytes();
        let folder = tempfile::Builder::new().prefix("adapter-").tempdir_in(job.scratch)?;
        let name = names::version(&self.base.name())?.0.to_owned();
        let written = work.write(&trained, &name, folder.path())?;
        run.measurements = eval::training::measure(&eval::training::Facts {
            report: &trained.report,
            trained: trained.trained,
            kept: trained.tuned.count(),
            ranks: &trained.ranks,
            bytes: written.bytes,
            seconds: trained.start_seconds + trained.report.seconds,
            peak_bytes,
        });
        // What was kept in our own form may be rounded there: it is measured as it is read back.
        let stored = tuning::read_own(&written, folder.path(), &work)?;
        let adapted = Adapted {
            model,
            tuned: stored.as_ref().unwrap_or(&trained.tuned),
            head: &trained.head,
            labels: &data.labels,
            max_length: Some(plan.settings.max_length),
            disk_bytes: made.disk_bytes(),
        };
        let empty = v1::Evaluation::default();
        let progress = progress.part(0.8, 1.0);
        let options = options.unwrap_or(&empty);
        run.measurements.extend(job.measure_adapted(&adapted, base, options, &progress)?);
        if let Some(base) = job.saved::<v1::ArmRun>(SAVED_BASE)? {
            run.measurements.extend(forgetting(&base.measurements, &run.measurements));
        }
        if let (KeepVersions::All, Place::Stored(base)) = (self.comparison.keep(), &made.place) {
            let operation = &job.operation.id;
            // Ids have no more than 63 characters; those of operations differ in their last ones.
            let end = &operation[operation.len().saturating_sub(8)..];
            let keep = Keep {
                id: &format!("{}-s{index}-{end}", run.arm),
                display_name: &format!("{}, seed {seed}", run.arm),
                base,
                seed,
                request_id: &format!("{}/{index}", job.operation.name()),
            };
            run.adapter = work.keep(&keep, written, folder.path())?.name();
        }
        run.training = Some(v1::TrainingReport { points: Vec::new(), ..trained.report });
        std::fs::remove_dir_all(&kept)?;
        Ok(())
    }
}

/// How much less likely texts became than they were to the base, where both were measured on them alike.
fn forgetting(base: &[v1::Measurement], tuned: &[v1::Measurement]) -> Vec<v1::Measurement> {
    let of_base = base.iter().filter(|m| m.metric == PERPLEXITY.name);
    let risen = of_base.filter_map(|before| {
        let same = |m: &&v1::Measurement| {
            m.metric == PERPLEXITY.name
                && m.protocol == before.protocol
                && m.samples.len() == before.samples.len()
        };
        let after = tuned.iter().find(same)?;
        let rises = after.samples.iter().zip(&before.samples).map(|(after, before)| after - before);
        Some(FORGETTING.sampled(rises.collect(), &after.protocol))
    });
    risen.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_text_is_forgotten_by_itself() {
        let measured =
            |protocol: &str, samples: &[f64]| PERPLEXITY.sampled(samples.to_vec(), protocol);
        let base = [measured("a", &[1.0, 2.0]), measured("b", &[3.0]), measured("c", &[1.0])];
        let tuned = [measured("b", &[5.0]), measured("a", &[1.5, 2.0]), measured("c", &[1.0, 2.0])];
        let found = forgetting(&base, &tuned);
        let values: Vec<_> = found.iter().map(|m| (m.protocol.as_str(), m.value)).collect();
        assert_eq!(values, [("a", 0.25), ("b", 2.0)]);
        assert!(found.iter().all(|m| m.metric == FORGETTING.name));
    }
}
