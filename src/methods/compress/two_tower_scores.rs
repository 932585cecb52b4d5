//! Scores of the groups of a model of two towers, by differences of the contrastive loss along random directions or
//! by its gradients.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Var};
use rand::Rng;
use rand::seq::SliceRandom;

use super::ecoflap::{Found, Settings};
use super::keep_budget::rank_correlation;
use super::two_tower::Group;
use super::zeroth::{self, NOISE};
use crate::data::images::Images;
use crate::error::{Error, Reason, Result};
use crate::kernels::training::contrast::contrast;
use crate::methods::StepContext;
use crate::models::two_tower::graph::{Graph, Pairs};
use crate::models::two_tower::plan::{Block, Ends, Inputs, Plan, patches};
use crate::models::two_tower::prompts::{Prompts, Texts};
use crate::models::two_tower::{Config, Model, Side, TEMPERATURE};
use crate::nn::ops::{Pool, Tape};
use crate::proto::v1::{CalibrationSampling, EcoflapAggregate, EcoflapScore};
use crate::seed::Stream;
use crate::train::memory;
use crate::train::parameters::{Gradients, Parameter, Parameters};
use crate::train::pass::InPlace;

/// Pairs of images and captions that were drawn: numbers of both.
pub(super) type Drawn = Vec<(usize, usize)>;

/// Draws pairs, each image once.
pub(super) fn draw(
    (images, prompts): (&Images, &Prompts),
    count: usize,
    sampling: CalibrationSampling,
    stream: &Stream,
) -> Drawn {
    let mut numbers: Vec<usize> = (0..images.len()).collect();
    let first = sampling == CalibrationSampling::First;
    let mut rng = stream.rng();
    if !first {
        numbers.shuffle(&mut rng);
    }
    numbers.truncate(count);
    let pairs = numbers.into_iter().enumerate().map(|(i, number)| {
        let template = if first { i % prompts.each } else { rng.random_range(0..prompts.each) };
        (number, usize::from(images.classes[number]) * prompts.each + template)
    });
    pairs.collect()
}

/// What scoring and pruning look at.
pub(super) struct Data<'a> {
    pub config: &'a Config,
    pub images: &'a Images,
    pub prompts: &'a Prompts,
}

impl Data<'_> {
    pub fn patches(&self, drawn: &[(usize, usize)]) -> Vec<f32> {
        let image = self.images.image();
        let mut out = vec![0.0; drawn.len() * image];
        for ((number, _), out) in drawn.iter().zip(out.chunks_exact_mut(image)) {
            patches(self.config, self.images.get(*number), out);
        }
        out
    }

    fn classes(&self, drawn: &[(usize, usize)]) -> Vec<u32> {
        drawn.iter().map(|(number, _)| self.images.classes[*number].into()).collect()
    }

    /// Each caption once, and which is whose.
    fn texts(&self, drawn: &[(usize, usize)]) -> Result<(Texts, Arc<[u32]>)> {
        self.prompts.pick(&drawn.iter().map(|(_, caption)| *caption).collect::<Vec<_>>())
    }
}

/// Rows `at` of `[.., width]`.
fn gather(rows: &[f32], at: &[u32], width: usize) -> Vec<f32> {
    at.iter().flat_map(|i| &rows[*i as usize * width..][..width]).copied().collect()
}

/// Batches that score: pairs need others beside them.
fn batches(drawn: &[(usize, usize)], settings: &Settings) -> Vec<Drawn> {
    drawn.chunks(settings.batch).filter(|pairs| pairs.len() > 1).map(<[_]>::to_vec).collect()
}

/// Sums over batches and directions of `|L+ - L-| / (2 eps)`, by group.
fn by_differences(
    cx: &StepContext<'_>,
    (model, data): (&Model, &Data<'_>),
    groups: &[Group],
    settings: &Settings,
    drawn: &[(usize, usize)],
) -> Result<zeroth::Scores> {
    let (config, weights) = (data.config, &model.weights);
    let temperature = model.weight(TEMPERATURE)?.to_f32()[0];
    let plan = Plan::new(config, weights)?;
    let before = memory::resident();
    let mut scores = zeroth::Scores { values: vec![0.0; groups.len()], ..Default::default() };
    let (mut quiet, mut tried) = (0, 0);
    let batches = batches(drawn, settings);
    let stream = cx.random.child("noise");
    for (i, batch) in batches.iter().enumerate() {
        let rows = data.patches(batch);
        let (texts, at) = data.texts(batch)?;
        let classes = data.classes(batch);
        let vectors = [
            plan.embed(Side::Image, &Inputs::Patches(&rows))?,
            plan.embed(Side::Text, &Inputs::Texts(&texts))?,
        ];
        for side in Side::BOTH {
            let ends = Ends::new(config, weights, side)?;
            let inputs = match side {
                Side::Image => Inputs::Patches(&rows),
                Side::Text => Inputs::Texts(&texts),
            };
            let (mut states, ranges) = ends.start(&inputs)?;
            let blocks: Vec<Block> = (0..config.tower(side).layers)
                .map(|block| Block::new(config, weights, side, block))
                .collect::<Result<_>>()?;
            for (b, block) in blocks.iter().enumerate() {
                let own = groups.iter().enumerate();
                for (g, group) in own.filter(|(_, g)| (g.side, g.block) == (side, b)) {
                    let done =
                        (i * groups.len() + g) as f64 / (batches.len() * groups.len()) as f64;
                    cx.progress.report(done, &format!("scoring {}", group.name))?;
                    // The weights of a group move together, or each alone.
                    let each = if settings.separate { 1 } else { group.names.len() };
                    for names in group.names.chunks(each) {
                        for noise in 0..settings.noises {
                            let stream = stream.child(&format!("batch {i}/noise {noise}"));
                            let loss = |eps: f64| -> Result<f64> {
                                cx.progress.check()?;
                                let moved = zeroth::moved(weights, names, eps, &stream)?;
                                let mut states = states.clone();
                                let first = Block::new(config, &moved, side, b)?;
                                first.forward(&mut states, &ranges, &mut None);
                                for block in &blocks[b + 1..] {
                                    block.forward(&mut states, &ranges, &mut None);
                                }
                                let moved = ends.finish(&states, &ranges);
                                let [images, texts] = match side {
                                    Side::Image => [&moved, &vectors[1]],
                                    Side::Text => [&vectors[0], &moved],
                                };
                                let captions = gather(texts, &at, config.embedding);
                                let of = (&images[..], &captions[..]);
                                let found =
                                    contrast(of, config.embedding, temperature, &classes, false);
                                Ok(found.loss / classes.len() as f64)
                            };
                            let slope = zeroth::slope(settings.eps, loss).map_err(|e| {
                                e.within(names.first().map_or("no weight", String::as_str))
                            })?;
                            tried += 1;
                            quiet += usize::from((slope.value * 2.0 * slope.eps).abs() < NOISE);
                            scores.values[g] += slope.value.abs();
                        }
                    }
                    scores.memory = scores.memory.max(memory::resident().saturating_sub(before));
                }
                block.forward(&mut states, &ranges, &mut None);
            }
        }
    }
    if 2 * quiet > tried {
        scores.warnings.push(format!(
            "{quiet} of {tried} differences of the loss are below {NOISE}, where rounding is as large; \
             take a larger eps"
        ));
    }
    Ok(scores)
}

/// Sums over batches of `|g| |w|`, or of `g^2 w^2`, by group; and the memory that took.
fn by_gradients(
    cx: &StepContext<'_>,
    (model, data): (&Model, &Data<'_>),
    groups: &[Group],
    (settings, squared): (&Settings, bool),
    drawn: &[(usize, usize)],
) -> Result<(Vec<f64>, u64)> {
    let (before, mut most) = (memory::resident(), 0);
    let mut parameters = Parameters::new();
    for name in groups.iter().flat_map(|group| &group.names) {
        let weight = model.weight(name)?;
        let var = Var::from_vec(weight.to_f32(), weight.shape(), &Device::Cpu)?;
        parameters.insert(name.clone(), Parameter { var, rate: 1.0, decay: false });
    }
    let (graph, pool) = (Graph::new(model)?, Pool::default());
    let mut scores = vec![0.0; groups.len()];
    let batches = batches(drawn, settings);
    for (i, batch) in batches.iter().enumerate() {
        cx.progress.report(i as f64 / batches.len() as f64, "scoring by gradients")?;
        let rows = data.patches(batch);
        let mut patches = pool.take(rows.len());
        patches.copy_from_slice(&rows);
        let (texts, captions) = data.texts(batch)?;
        let classes = data.classes(batch);
        let tape = Tape::new(&pool);
        let pairs = Pairs { patches, texts: &texts, captions: &captions, classes: &classes };
        let loss = graph.loss(&tape, &InPlace(&parameters), pairs)?;
        let names: HashMap<_, _> =
            parameters.iter().map(|(name, p)| (p.var.id(), (&name[..], &p.var))).collect();
        let mut gradients = Gradients::new();
        let mut one = pool.take(1);
        one[0] = 1.0;
        tape.backward(&loss.value, one.into())?.collect(&names, &mut gradients)?;
        most = most.max(memory::resident().saturating_sub(before));
        for (score, group) in scores.iter_mut().zip(groups) {
            for name in &group.names {
                let (Some(gradient), Some(parameter)) = (gradients.get(name), parameters.get(name))
                else {
                    continue;
                };
                let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
                let values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
                let each = gradient.iter().zip(&values).map(|(g, w)| {
                    let product = (f64::from(*g) / classes.len() as f64 * f64::from(*w)).abs();
                    if squared { product * product } else { product }
                });
                *score += each.sum::<f64>();
            }
        }
    }
    match scores.iter().position(|score| !score.is_finite()) {
        None => Ok((scores, most)),
        Some(g) => Err(Error::new(
            Reason::NonFinite,
            format!(
                "a gradient of {} is not finite; the model may be broken: evaluate it",
                groups[g].name
            ),
        )),
    }
}

/// Scores the groups.
pub(super) fn score(
    cx: &StepContext<'_>,
    of: (&Model, &Data<'_>),
    groups: &[Group],
    settings: &Settings,
    compare: bool,
) -> Result<Found> {
    if settings.score == EcoflapScore::Uniform {
        return Ok(Found { scores: vec![1.0; groups.len()], ..Found::default() });
    }
    let (_, data) = of;
    let stream = cx.random.child("scores");
    let count = settings.data.sequences;
    let from = (data.images, data.prompts);
    let drawn = draw(from, count, settings.calibration.sampling, &stream);
    let mut found = Found::default();
    if batches(&drawn, settings).is_empty() {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            "one image alone cannot be told from others; take a data set with more",
        ));
    }
    let differences = settings.score == EcoflapScore::Zeroth;
    // Differences first: what they leave to the allocator can only make the other's memory look smaller.
    let by_loss = match differences || compare {
        true => Some(by_differences(cx, of, groups, settings, &drawn)?),
        false => None,
    };
    let by_slope = match !differences || compare {
        true => {
            let how = (settings, settings.score == EcoflapScore::Fisher);
            Some(by_gradients(cx, of, groups, how, &drawn)?)
        }
        false => None,
    };
    if let (Some(by_loss), Some((by_slope, memory))) = (&by_loss, &by_slope) {
        found.correlation = Some(rank_correlation(&by_loss.values, by_slope));
        found.memory_share = (*memory > 0).then(|| by_loss.memory as f64 / *memory as f64);
    }
    (found.scores, found.memory) = match (differences, by_loss, by_slope) {
        (true, Some(scores), _) => {
            found.warnings.extend(scores.warnings);
            (scores.values, scores.memory)
        }
        (_, _, Some((scores, memory))) => (scores, memory),
        _ => return Err(Error::internal("nothing was scored")),
    };
    if settings.aggregate == EcoflapAggregate::Average {
        for (score, group) in found.scores.iter_mut().zip(groups) {
            *score /= elements(of.0, &group.names)?.max(1) as f64;
        }
    }
    if found.scores.iter().all(|s| *s == 0.0) {
        found.warnings.push("no group has a score: all get the same share".to_owned());
    }
    Ok(found)
}

/// Elements of these weights.
pub(super) fn elements(model: &Model, names: &[String]) -> Result<u64> {
    let each = names.iter().map(|name| {
        let weight = model.weight(name)?;
        Ok((weight.rows() * weight.cols()) as u64)
    });
    each.sum()
}
