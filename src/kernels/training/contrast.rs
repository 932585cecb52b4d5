//! The symmetric contrastive loss of pairs, and its gradients. Batches are small beside the towers that make them,
//! so all sums are in f64.

use rayon::prelude::*;

/// Similarities are multiplied by this at most.
pub const MOST: f64 = 100.0;

/// Squares of lengths below this count as this.
const LEAST: f64 = 1e-24;

/// What a batch adds up to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Contrast {
    /// Sum over the pairs of the mean of both directions' cross-entropies.
    pub loss: f64,
    /// Images whose nearest caption is one of their class.
    pub right: u64,
    /// Of the sum, where asked for.
    pub gradients: Option<Gradients>,
}

/// Gradients with respect to the inputs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gradients {
    pub images: Vec<f32>,
    pub captions: Vec<f32>,
    pub temperature: f32,
}

/// The factor on similarities that a temperature means: its exponential, at most [`MOST`].
pub fn factor(temperature: f32) -> f64 {
    f64::from(temperature).exp().min(MOST)
}

/// Rows of length 1, and the lengths that they had.
fn unit(rows: &[f32], width: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut lengths) = (Vec::with_capacity(rows.len()), Vec::new());
    for row in rows.chunks_exact(width) {
        let squares: f64 = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        // What is no number must show.
        let length = if squares < LEAST { LEAST.sqrt() } else { squares.sqrt() };
        out.extend(row.iter().map(|v| f64::from(*v) / length));
        lengths.push(length);
    }
    (out, lengths)
}

/// Rows of length 1 of `width` numbers.
pub fn normalised(rows: &[f32], width: usize) -> Vec<f32> {
    unit(rows, width).0.into_iter().map(|v| v as f32).collect()
}

/// `ln sum exp` of some numbers.
fn log_sum(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let top = values.clone().fold(f64::NEG_INFINITY, f64::max);
    values.map(|v| (v - top).exp()).sum::<f64>().ln() + top
}

/// Image `i` and caption `i`, rows of `width` numbers of any length, belong together and have the class
/// `classes[i]`. An image is to find the captions of its class among all, each with the same chance, and a caption the
/// images of its class: several pairs of a class mean the same, and to tell them apart would be wrong.
///
/// # Panics
/// If sizes do not fit.
pub fn contrast(
    (images, captions): (&[f32], &[f32]),
    width: usize,
    temperature: f32,
    classes: &[u32],
    gradients: bool,
) -> Contrast {
    let pairs = classes.len();
    assert!(
        images.len() == pairs * width && captions.len() == pairs * width,
        "sizes of pairs do not fit"
    );
    let ((a, a_lengths), (b, b_lengths)) = (unit(images, width), unit(captions, width));
    let by = factor(temperature);
    let row = |of: &[f64], i: usize| -> Vec<f64> { of[i * width..(i + 1) * width].to_vec() };
    // Cosines, `[images, captions]`.
    let mut cosines = vec![0.0; pairs * pairs];
    cosines.par_chunks_mut(pairs.max(1)).enumerate().for_each(|(i, out)| {
        let own = row(&a, i);
        for (out, other) in out.iter_mut().zip(b.chunks_exact(width)) {
            *out = own.iter().zip(other).map(|(x, y)| x * y).sum();
        }
    });
    let at = |i: usize, j: usize| by * cosines[i * pairs + j];
    let by_image: Vec<f64> =
        (0..pairs).into_par_iter().map(|i| log_sum((0..pairs).map(|j| at(i, j)))).collect();
    let by_caption: Vec<f64> =
        (0..pairs).into_par_iter().map(|j| log_sum((0..pairs).map(|i| at(i, j)))).collect();
    let mut of_class = std::collections::BTreeMap::new();
    for class in classes {
        *of_class.entry(*class).or_insert(0.0) += 1.0;
    }
    let share: Vec<f64> = classes.iter().map(|class| 1.0 / of_class[class]).collect();
    let mut found = Contrast::default();
    for (i, class) in classes.iter().enumerate() {
        let mut top = (f64::NEG_INFINITY, class);
        for (j, other) in classes.iter().enumerate() {
            let score = at(i, j);
            if score > top.0 {
                top = (score, other);
            }
            if class == other {
                let both = by_image[i] + by_caption[j];
                found.loss += share[i] * (both / 2.0 - score);
            }
        }
        // Scores that are no numbers have no largest.
        found.right += u64::from(top.1 == class && top.0.is_finite());
    }
    if !gradients {
        return found;
    }
    // Of the scores.
    let mut slopes = vec![0.0; pairs * pairs];
    slopes.par_chunks_mut(pairs.max(1)).enumerate().for_each(|(i, out)| {
        for (j, out) in out.iter_mut().enumerate() {
            let score = at(i, j);
            let wanted = if classes[i] == classes[j] { share[i] } else { 0.0 };
            let chances = (score - by_image[i]).exp() + (score - by_caption[j]).exp();
            *out = chances / 2.0 - wanted;
        }
    });
    let slope: f64 = slopes.iter().zip(&cosines).map(|(g, c)| g * c).sum::<f64>() * by;
    // Beyond its limit the temperature can only come back.
    let beyond = f64::from(temperature).exp() > MOST;
    let temperature = if beyond { slope.max(0.0) } else { slope };
    let back = |own: &[f64], others: &[f64], lengths: &[f64], transposed: bool| -> Vec<f32> {
        let rows = (0..pairs).into_par_iter().flat_map_iter(|i| {
            let mut g = vec![0.0; width];
            for (j, other) in others.chunks_exact(width).enumerate() {
                let slope = if transposed { slopes[j * pairs + i] } else { slopes[i * pairs + j] };
                g.iter_mut().zip(other).for_each(|(g, o)| *g += by * slope * o);
            }
            // What changes the length alone changes nothing.
            let own = row(own, i);
            let along: f64 = g.iter().zip(&own).map(|(g, o)| g * o).sum();
            let length = lengths[i];
            g.into_iter().zip(own).map(move |(g, o)| ((g - along * o) / length) as f32)
        });
        rows.collect()
    };
    found.gradients = Some(Gradients {
        images: back(&a, &b, &a_lengths, false),
        captions: back(&b, &a, &b_lengths, true),
        temperature: temperature as f32,
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, by: f32) -> Vec<f32> {
        (0..count).map(|i| ((i + 1) as f32 * by).sin() * 2.0).collect()
    }

    #[test]
    fn losses_by_hand() {
        // Two pairs at right angles, each alone in its class.
        let rows = [3.0, 0.0, 0.0, 0.5];
        let found = contrast((&rows, &rows), 2, 2f32.ln(), &[4, 7], false);
        let each = (1.0 + (-2f64).exp()).ln();
        assert!((found.loss - 2.0 * each).abs() < 1e-6, "{found:?}");
        assert_eq!((found.right, found.gradients), (2, None));
        // Of one class both captions are as right as each other: chances 1/2 each, less the mean score.
        let same = contrast((&rows, &rows), 2, 2f32.ln(), &[4, 4], false);
        let each = (2f64.exp() + 1.0).ln() - 1.0;
        assert!((same.loss - 2.0 * each).abs() < 1e-6, "{same:?}");
        // Nothing is better than the entropy of the targets.
        assert!(same.loss > 2.0 * 2f64.ln());
        assert_eq!(contrast((&[], &[]), 2, 0.0, &[], true).loss, 0.0);
        assert_eq!((factor(20.0), factor(0.0)), (MOST, 1.0));
    }

    #[test]
    fn gradients_are_differences() {
        let (width, classes) = (3, [1, 0, 1, 2, 0]);
        let (images, captions) = (noise(15, 0.7), noise(15, 1.3));
        let at = |images: &[f32], captions: &[f32], t: f32| {
            contrast((images, captions), width, t, &classes, false).loss
        };
        let found = contrast((&images, &captions), width, 0.4, &classes, true).gradients.unwrap();
        let step = 1e-3;
        let moved = |of: &[f32], i: usize, by: f32| {
            let mut of = of.to_vec();
            of[i] += by;
            of
        };
        for i in 0..15 {
            let slope = (at(&moved(&images, i, step), &captions, 0.4)
                - at(&moved(&images, i, -step), &captions, 0.4))
                / f64::from(2.0 * step);
            assert!((slope - f64::from(found.images[i])).abs() < 2e-3, "image {i}: {slope}");
            let slope = (at(&images, &moved(&captions, i, step), 0.4)
                - at(&images, &moved(&captions, i, -step), 0.4))
                / f64::from(2.0 * step);
            assert!((slope - f64::from(found.captions[i])).abs() < 2e-3, "caption {i}: {slope}");
        }
        let slope = (at(&images, &captions, 0.4 + step) - at(&images, &captions, 0.4 - step))
            / f64::from(2.0 * step);
        assert!((slope - f64::from(found.temperature)).abs() < 2e-3, "{slope}");
        // At its limit the temperature does not grow on.
        let same = contrast((&images, &images), width, 9.0, &[0, 1, 2, 3, 4], true);
        assert!(same.gradients.unwrap().temperature >= 0.0);
    }

    #[test]
    fn what_is_no_number_shows() {
        let mut rows = noise(6, 0.9);
        rows[2] = f32::NAN;
        let found = contrast((&rows, &rows), 3, 0.0, &[0, 1], true);
        assert!(found.loss.is_nan());
        // A row of zeros has no direction, and does no harm.
        let zeros = contrast((&[0.0; 6], &noise(6, 0.9)), 3, 0.0, &[0, 1], true);
        assert!(zeros.loss.is_finite() && zeros.gradients.unwrap().captions[0].is_finite());
    }
}
