//! Measuring models of two towers on images and captions of their classes: classification by captions, and finding
//! each by the other.

use rayon::prelude::*;

use super::{mark, metrics};
use crate::data::images::Images;
use crate::error::Result;
use crate::models::two_tower::plan::Plan;
use crate::models::two_tower::prompts::Prompts;
use crate::models::two_tower::{Config, Model};
use crate::progress::Progress;
use crate::proto::v1;

/// Images that are embedded between two looks at cancellation.
const EACH: usize = 512;

/// Images among which a caption is to find one of its class. Among all it nearly always would.
const CROWD: usize = 100;

/// Bytes of states that one image may take, see [`bytes`].
pub const ONE_IMAGE: usize = 1 << 30;

/// Bytes that one image takes at most between two products.
pub fn bytes(config: &Config) -> usize {
    4 * config.image.positions * (6 * config.image.hidden + config.image.intermediate)
}

/// `zero_shot_accuracy`, `image_to_text_recall` and `text_to_image_recall`. Captions are those of the data set, for
/// each class by all templates.
pub fn measure(
    model: &Model,
    images: &Images,
    asked: &v1::ImageEvaluation,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let (config, width) = (&model.family, model.family.embedding);
    let prompts = Prompts::of(model, images)?;
    let plan = Plan::new(config, &model.weights)?;
    let captions = plan.texts(prompts.all())?;
    let count = asked.max_items.map_or(images.len(), |most| images.len().min(most as usize));
    let mut vectors = Vec::with_capacity(count * width);
    for first in (0..count).step_by(EACH) {
        progress.report(first as f64 / count as f64, &format!("image {first} of {count}"))?;
        let last = count.min(first + EACH);
        vectors.extend(plan.images(&images.pixels[first * images.image()..last * images.image()])?);
    }
    let classes: Vec<usize> = images.classes[..count].iter().map(|c| usize::from(*c)).collect();
    let found = Found { captions: &captions, each: prompts.each, images: &vectors, width };
    let protocol = format!(
        "{}, {count} images ({}), {} classes in {} templates, {} threads",
        asked.dataset,
        mark(&[&images.pixels[..count * images.image()], &images.classes[..count]].concat()),
        prompts.classes(),
        prompts.each,
        rayon::current_num_threads(),
    );
    let crowds = format!("{protocol}, among {CROWD} images each");
    Ok(vec![
        metrics::ZERO_SHOT_ACCURACY.sampled(found.by_class(&classes), &protocol),
        metrics::IMAGE_TO_TEXT_RECALL.sampled(found.captions_of(&classes), &protocol),
        metrics::TEXT_TO_IMAGE_RECALL.sampled(found.images_of(&classes), crowds),
    ])
}

/// Vectors of length 1: captions class by class, `each` of a class, and images.
struct Found<'a> {
    captions: &'a [f32],
    each: usize,
    images: &'a [f32],
    width: usize,
}

impl Found<'_> {
    /// For each image 1 where the mean of its class's captions is nearest.
    fn by_class(&self, classes: &[usize]) -> Vec<f64> {
        let mut means = Vec::new();
        for class in self.captions.chunks_exact(self.each * self.width) {
            let mut mean = vec![0.0f64; self.width];
            for caption in class.chunks_exact(self.width) {
                mean.iter_mut().zip(caption).for_each(|(m, v)| *m += f64::from(*v));
            }
            let length = mean.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
            means.extend(mean.into_iter().map(|v| (v / length) as f32));
        }
        let images = self.images.par_chunks_exact(self.width).zip(classes);
        images
            .map(|(image, class)| f64::from(u8::from(nearest(image, &means) == Some(*class))))
            .collect()
    }

    /// For each image 1 where the nearest caption is one of its class.
    fn captions_of(&self, classes: &[usize]) -> Vec<f64> {
        let images = self.images.par_chunks_exact(self.width).zip(classes);
        let right = |(image, class): (&[f32], &usize)| {
            nearest(image, self.captions).is_some_and(|at| at / self.each == *class)
        };
        images.map(|pair| f64::from(u8::from(right(pair)))).collect()
    }

    /// For each crowd of images and each caption whose class is in it, 1 where the nearest image is of that class.
    fn images_of(&self, classes: &[usize]) -> Vec<f64> {
        let crowds = self.images.par_chunks(CROWD * self.width).zip(classes.par_chunks(CROWD));
        let each = crowds.map(|(images, classes)| {
            let captions = self.captions.chunks_exact(self.width).enumerate();
            let there = captions.filter(|(at, _)| classes.contains(&(at / self.each)));
            let right = there.map(|(at, caption)| {
                let found = nearest(caption, images).is_some_and(|i| classes[i] == at / self.each);
                f64::from(u8::from(found))
            });
            right.collect::<Vec<_>>()
        });
        each.collect::<Vec<_>>().concat()
    }
}

/// The row with the largest product, the first of several; none where products are no numbers.
fn nearest(of: &[f32], rows: &[f32]) -> Option<usize> {
    let mut best = None;
    for (i, row) in rows.chunks_exact(of.len()).enumerate() {
        let score: f32 = of.iter().zip(row).map(|(a, b)| a * b).sum();
        if score > best.map_or(f32::NEG_INFINITY, |(_, top)| top) {
            best = Some((i, score));
        }
    }
    best.map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_by_hand() {
        // Two classes of two captions each, in a plane.
        let captions = [1.0, 0.0, 0.6, 0.8, 0.0, 1.0, -0.6, 0.8];
        // Nearest captions: 0, 1, 2, 1. Means of the classes lie at (0.8, 0.4) and (-0.3, 0.9).
        let images = [1.0, 0.0, 0.6, 0.8, 0.1, 0.99, 0.5, 0.86];
        let found = Found { captions: &captions, each: 2, images: &images, width: 2 };
        let classes = [0, 0, 1, 1];
        assert_eq!(found.captions_of(&classes), [1.0, 1.0, 1.0, 0.0]);
        assert_eq!(found.by_class(&classes), [1.0, 1.0, 1.0, 0.0]);
        // Captions find images 0, 1, 2, 2.
        assert_eq!(found.images_of(&classes), [1.0; 4]);
        assert_eq!(found.images_of(&[1, 0, 0, 0]), [0.0, 1.0, 0.0, 0.0]);
        // What is in no crowd is not looked for.
        assert_eq!(found.images_of(&[1; 4]), [1.0, 1.0]);
        assert_eq!(nearest(&[f32::NAN, 0.0], &captions), None);
    }
}
