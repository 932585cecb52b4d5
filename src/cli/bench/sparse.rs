//! `planish bench kernels --row-groups` and `planish bench images`: what group sparsity is worth.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::super::error::{CliError, Result};
use super::super::output::{Output, facts, significant, table};
use super::{Common, blocking, bytes, fetch, percent, print, spread};
use crate::bench::images::{self, Images, Run};
use crate::bench::row_groups::Found;
use crate::calibrate;
use crate::error::Error;
use crate::methods::{Learning, Method, NoDatasets, StepContext};
use crate::models::{AnyModel, import, random};
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;

#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// File or folder of an image classifier, or random: and a configuration in JSON
    model: String,
    /// Images that are classified at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch: usize,
    /// Prune the model first, by `group_sparse`: the share of the units that goes
    #[arg(long, value_name = "SHARE")]
    sparsity: Option<f64>,
    /// Outputs that share their inputs, when the model is pruned first
    #[arg(long, value_name = "N", default_value_t = 8)]
    group: u32,
    #[command(flatten)]
    common: Common,
}

impl ImagesArgs {
    pub(super) async fn run(self, form: Output) -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| CliError::file("making a folder", &e))?;
        let place = folder.path().to_owned();
        blocking(move || {
            self.common.apply()?;
            let mut model = match self.model.strip_prefix("random:") {
                Some(config) => {
                    let config = serde_json::from_str(config).map_err(|e| {
                        CliError::from(Error::field("model", format!("is no JSON: {e}")))
                    })?;
                    random::model(config, &Stream::root(0))?
                }
                None => import::open_any(&fetch(&self.model, &place, form)?)?,
            };
            if let Some(sparsity) = self.sparsity {
                model = prune(model, sparsity, self.group, place.clone())?;
            }
            let AnyModel::Vision(model) = model else {
                let problem = "is no image classifier; `planish bench decode` is for decoders";
                return Err(Error::field("model", problem).into());
            };
            let run = Run { batch: self.batch, repetitions: self.common.repetitions.into() };
            let found = images::measure(&model, run)?;
            let limits = self.common.limits(found.weight_bytes);
            print(form, "images", Some(&self.model), limits.as_ref(), found, images_text)
        })
        .await
    }
}

fn prune(model: AnyModel, sparsity: f64, group: u32, scratch: PathBuf) -> Result<AnyModel> {
    let mut step =
        v1::GroupSparse { sparsity: Some(sparsity), group: Some(group), ..Default::default() };
    step.resolve();
    step.check_any(&model.info())?;
    let no_texts =
        |name: &str| -> crate::error::Result<Arc<String>> { Err(Error::not_found(name, "")) };
    let mut cx = StepContext {
        random: Stream::root(0),
        progress: &Progress::silent(),
        texts: &no_texts,
        calibrations: &calibrate::Shared::default(),
        digest: "",
        scratch: scratch.clone(),
    };
    let mut learning = Learning::new(&NoDatasets, scratch);
    Ok(step.apply_any(&mut cx, &mut learning, model)?.model)
}

fn images_text(found: &Images) -> String {
    facts(&[
        ("images/s", spread(&found.images_per_second)),
        ("with dense weights", spread(&found.dense_images_per_second)),
        ("over dense", format!("{:.3}", found.over_dense)),
        ("zeros", percent(found.zero_share)),
        ("weights", bytes(found.weight_bytes)),
        ("dense weights", bytes(found.dense_bytes)),
        ("largest difference", format!("{:.1e}", found.difference)),
    ])
}

pub(super) fn row_groups_text(found: &Found) -> String {
    let header = ["shape", "tokens", "density", "us", "same tile us", "library us", "over", "over"];
    let rows = found.rows.iter().map(|row| {
        vec![
            format!("{}x{}", row.shape[0], row.shape[1]),
            row.tokens.to_string(),
            percent(row.density),
            spread(&row.microseconds),
            spread(&row.same_tile_microseconds),
            spread(&row.library_microseconds),
            significant(row.over_same_tile),
            significant(row.over_library),
        ]
    });
    let rows = table(&header, &[1, 2, 3, 4, 5, 6, 7], rows.collect());
    let header = ["density", "tokens", "over same tile", "over library"];
    let means = found.means.iter().map(|mean| {
        vec![
            percent(mean.density),
            mean.tokens.map_or_else(|| "all".to_owned(), |tokens| tokens.to_string()),
            significant(mean.over_same_tile),
            significant(mean.over_library),
        ]
    });
    let means = table(&header, &[0, 1, 2, 3], means.collect());
    format!("groups of {}\n{rows}\n\ngeometric means\n{means}", found.group)
}
