//! Checkpoints: everything that the rest of a run follows from, in a file that is there whole or not at all.
//!
//! `last.safetensors` holds the parameters, the average, the optimiser's moments, what the hooks remember
//! and, as JSON bytes, where the run stands: the number of updates done (from which the order of the data
//! and all random streams follow), the history, and which validation was the best. The parameters of that
//! one are in `best-{step}.safetensors`, written before the `last` that names it and removed after the next
//! one that names another. So a process may end between any two writes.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::ema::Ema;
use super::history::History;
use super::optimizer::{Moment, Optimizer, State};
use super::parameters::Parameters;
use super::tensors;
use crate::error::{Error, Reason, Result};
use crate::formats::safetensors::{self, Plan};
use crate::nn::dtype::Dtype;

const LAST: &str = "last.safetensors";
const BEST: &str = "best-";
/// The tensor that holds [`Standing`] as JSON.
const STANDING: &str = "standing";

/// The best validation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub loss: f64,
}

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// Of options, data, streams and trained tensors: a run goes on only as itself.
    pub fingerprint: String,
    /// Updates done.
    pub step: u64,
    pub best: Option<Best>,
    /// Validations since the best one.
    pub waited: u32,
    /// Whether it ended early.
    pub stopped: bool,
    /// Tokens that went through the model in training.
    pub tokens: u64,
    /// Seconds of updates, and of all that was done.
    pub training_seconds: f64,
    pub seconds: f64,
    /// Most bytes that were resident.
    pub resident: u64,
    pub history: History,
    /// Updates that each tensor with moments took part in.
    updates: BTreeMap<String, u64>,
}

impl Standing {
    /// A run that has not begun.
    pub fn new(fingerprint: String) -> Self {
        Self {
            fingerprint,
            step: 0,
            best: None,
            waited: 0,
            stopped: false,
            tokens: 0,
            training_seconds: 0.0,
            seconds: 0.0,
            resident: 0,
            history: History::default(),
            updates: BTreeMap::new(),
        }
    }
}

/// The checkpoints of a run.
pub struct Folder {
    path: PathBuf,
    /// The best that the last checkpoint names.
    named: Option<u64>,
}

/// What a tensor of a file is written from.
enum Source<'a> {
    Tensor(&'a Tensor),
    Floats(&'a [f32]),
    Bytes(&'a [u8]),
}

impl Folder {
    /// A folder of the run's own, made when it is missing.
    pub fn new(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        Ok(Self { path: path.to_owned(), named: None })
    }

    /// Replaces the last checkpoint, then removes what that no longer names.
    pub fn save(
        &mut self,
        standing: &mut Standing,
        parameters: &Parameters,
        ema: Option<&Ema>,
        optimizer: &Optimizer,
        hooks: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let states = optimizer.states();
        standing.updates = states.iter().map(|(name, s)| (name.clone(), s.updates)).collect();
        let json = serde_json::to_vec(standing)
            .map_err(|e| Error::internal(format!("a run cannot be written down: {e}")))?;
        let mut file = Contents::default();
        file.add(STANDING.to_owned(), vec![json.len()], Source::Bytes(&json));
        for (name, parameter) in parameters {
            file.tensor(format!("parameter/{name}"), &parameter.var);
        }
        for (name, average) in ema.iter().flat_map(|ema| &ema.averages) {
            file.tensor(format!("average/{name}"), average);
        }
        for (name, tensor) in hooks {
            file.tensor(format!("hooks/{name}"), tensor);
        }
        for (name, state) in states {
            for (index, moment) in state.moments.iter().enumerate() {
                file.moment(&format!("moment{index}/{name}"), moment);
            }
        }
        file.write(&self.path.join(LAST))?;
        self.named = standing.best.map(|best| best.step);
        self.tidy(self.named)
    }

    /// Puts the last checkpoint into the parameters, the average and the optimiser, and gives what the hooks
    /// remembered; `None` when there is none.
    ///
    /// # Errors
    /// `INTERNAL` when it is of another run: the folder belongs to one; `MALFORMED_FILE` when it is damaged.
    pub fn load(
        &mut self,
        fingerprint: &str,
        parameters: &Parameters,
        ema: Option<&mut Ema>,
        optimizer: &mut Optimizer,
    ) -> Result<Option<(Standing, BTreeMap<String, Tensor>)>> {
        let path = self.path.join(LAST);
        if !path.exists() {
            return Ok(None);
        }
        let file = safetensors::open(&path)?;
        let json = file.tensors.get(STANDING).ok_or_else(|| damaged(STANDING))?;
        let standing: Standing =
            serde_json::from_slice(&json.data).map_err(|_| damaged(STANDING))?;
        if standing.fingerprint != fingerprint {
            return Err(Error::internal(
                "the checkpoint is of a run with other options, data or trained tensors",
            ));
        }
        put(&file, "parameter/", parameters)?;
        if let Some(ema) = ema {
            for (name, average) in &mut ema.averages {
                fill(&file, &format!("average/{name}"), average)?;
            }
        }
        for (name, updates) in &standing.updates {
            let parameter = parameters.get(name).ok_or_else(|| damaged(name))?;
            let moments = (0..optimizer.rule().moments())
                .map(|index| moment(&file, &format!("moment{index}/{name}"), index == 0))
                .collect::<Result<_>>()?;
            optimizer.restore(name, parameter, State { updates: *updates, moments })?;
        }
        let mut hooks = BTreeMap::new();
        for (name, tensor) in &file.tensors {
            if let Some(name) = name.strip_prefix("hooks/") {
                let values = floats(tensor).ok_or_else(|| damaged(name))?;
                let shape = tensor.shape.as_slice();
                hooks.insert(name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu)?);
            }
        }
        self.named = standing.best.map(|best| best.step);
        self.tidy(self.named)?;
        Ok(Some((standing, hooks)))
    }

    /// Writes the parameters of the best validation, before the checkpoint that names it.
    pub fn save_best(&self, step: u64, parameters: &Parameters) -> Result<()> {
        let mut file = Contents::default();
        for (name, parameter) in parameters {
            file.tensor(format!("parameter/{name}"), &parameter.var);
        }
        file.write(&self.best(step))?;
        self.tidy(Some(step))
    }

    /// Puts the parameters of the best validation in.
    pub fn load_best(&self, step: u64, parameters: &Parameters) -> Result<()> {
        put(&safetensors::open(&self.best(step))?, "parameter/", parameters)
    }

    fn best(&self, step: u64) -> PathBuf {
        self.path.join(format!("{BEST}{step}.safetensors"))
    }

    /// Removes what is not needed: bests that are neither `best` nor named by the last checkpoint, and files
    /// that were not finished.
    fn tidy(&self, best: Option<u64>) -> Result<()> {
        let kept = [best, self.named].map(|step| step.map(|step| self.best(step)));
        for entry in std::fs::read_dir(&self.path)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let ours = name.starts_with(BEST) || name.ends_with(".partial");
            if ours && !kept.iter().flatten().any(|kept| *kept == path) {
                may_be_killed()?;
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// The tensors of a file to be written.
#[derive(Default)]
struct Contents<'a> {
    plans: Vec<Plan>,
    sources: BTreeMap<String, Source<'a>>,
}

impl<'a> Contents<'a> {
    fn add(&mut self, name: String, shape: Vec<usize>, source: Source<'a>) {
        let dtype = if matches!(source, Source::Bytes(_)) { Dtype::U8 } else { Dtype::F32 };
        self.plans.push(Plan { name: name.clone(), dtype, shape });
        self.sources.insert(name, source);
    }

    fn tensor(&mut self, name: String, tensor: &'a Tensor) {
        self.add(name, tensor.dims().to_vec(), Source::Tensor(tensor));
    }

    fn moment(&mut self, name: &str, moment: &'a Moment) {
        match moment {
            Moment::Full(values) => {
                self.add(name.to_owned(), vec![values.len()], Source::Floats(values));
            }
            Moment::Blocks { codes, scales, .. } => {
                self.add(format!("{name}.codes"), vec![codes.len()], Source::Bytes(codes));
                self.add(format!("{name}.scales"), vec![scales.len()], Source::Floats(scales));
            }
        }
    }

    fn write(&self, path: &Path) -> Result<()> {
        may_be_killed()?;
        safetensors::write(path, &self.plans, &mut |plan, out| {
            may_be_killed()?;
            match self.sources.get(&plan.name) {
                Some(Source::Bytes(bytes)) => Ok(out.write_all(bytes)?),
                Some(Source::Floats(values)) => write_floats(values, out),
                Some(Source::Tensor(tensor)) => {
                    tensors::read(tensor, |values| write_floats(values, out))?
                }
                None => Err(Error::internal(format!("'{}' has no content", plan.name))),
            }
        })?;
        may_be_killed()
    }
}

fn write_floats(values: &[f32], out: &mut dyn Write) -> Result<()> {
    let mut buffer = Vec::with_capacity(4096);
    for values in values.chunks(1024) {
        buffer.clear();
        values.iter().for_each(|value| buffer.extend_from_slice(&value.to_le_bytes()));
        out.write_all(&buffer)?;
    }
    Ok(())
}

fn put(file: &safetensors::File, prefix: &str, parameters: &Parameters) -> Result<()> {
    for (name, parameter) in parameters {
        fill(file, &format!("{prefix}{name}"), &parameter.var)?;
    }
    Ok(())
}

/// Writes the tensor `name` of a file over another one of its shape.
fn fill(file: &safetensors::File, name: &str, target: &Tensor) -> Result<()> {
    let tensor = file.tensors.get(name).filter(|tensor| tensor.shape == target.dims());
    let values = tensor.and_then(floats).ok_or_else(|| damaged(name))?;
    tensors::change(target, |target| target.copy_from_slice(&values))
}

fn moment(file: &safetensors::File, name: &str, signed: bool) -> Result<Moment> {
    if let Some(tensor) = file.tensors.get(name) {
        return Ok(Moment::Full(floats(tensor).ok_or_else(|| damaged(name))?));
    }
    let part = |end: &str| file.tensors.get(&format!("{name}.{end}"));
    let codes = part("codes").filter(|codes| codes.dtype == Dtype::U8);
    let scales = part("scales").and_then(floats);
    let (codes, scales) = codes.zip(scales).ok_or_else(|| damaged(name))?;
    Moment::blocks(signed, codes.data.to_vec(), scales).ok_or_else(|| damaged(name))
}

fn floats(tensor: &safetensors::Tensor) -> Option<Vec<f32>> {
    let read = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
    (tensor.dtype == Dtype::F32).then(|| tensor.data.as_chunks().0.iter().map(read).collect())
}

fn damaged(name: &str) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!("the checkpoint lacks '{name}' in the shape that is trained; start the run anew"),
    )
}

#[cfg(not(test))]
fn may_be_killed() -> Result<()> {
    Ok(())
}

#[cfg(test)]
thread_local! {
    /// Actions on the disk that are done before the process is taken for killed.
    pub(super) static LIFE: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
fn may_be_killed() -> Result<()> {
    match LIFE.get() {
        None => Ok(()),
        Some(0) => Err(Error::internal("killed")),
        Some(left) => {
            LIFE.set(Some(left - 1));
            Ok(())
        }
    }
}
