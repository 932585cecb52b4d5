//! The contrastive loss of two towers.

use std::sync::Arc;

use super::head::{Loss, Sums};
use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::contrast::{self, Gradients};

impl Tape {
    /// The symmetric contrastive loss of pairs, summed: row `i` of `images` belongs to row `i` of `captions`, and
    /// all pairs of a class mean the same. Rows may have any length; `temperature` is one number, the logarithm of
    /// what cosines are multiplied by. `right` counts images whose nearest caption is of their class.
    ///
    /// # Errors
    /// INTERNAL if sizes do not fit.
    pub fn contrast(
        &self,
        images: &Value,
        captions: &Value,
        temperature: &Value,
        classes: &[u32],
    ) -> Result<Loss> {
        let width = images.width();
        if captions.width() != width
            || images.rows() != classes.len()
            || captions.rows() != classes.len()
            || temperature.rows() * temperature.width() != 1
        {
            return Err(Error::internal("images, captions and classes do not fit each other"));
        }
        let nodes = [images.node(), captions.node(), temperature.node()];
        let wanted = self.is_recording() && nodes.iter().any(Option::is_some);
        let found = contrast::contrast(
            (&images.read(), &captions.read()),
            width,
            temperature.read()[0],
            classes,
            wanted,
        );
        let gradients = found.gradients.unwrap_or_default();
        let value = self.number(found.loss as f32, &nodes, || {
            move |by, sink| {
                let Gradients { images, captions, temperature } = gradients;
                for (node, gradient) in nodes.into_iter().zip([images, captions, vec![temperature]])
                {
                    let Some(node) = node else { continue };
                    let mut out = sink.pool().take(gradient.len());
                    out.iter_mut().zip(&gradient).for_each(|(out, g)| *out = by * g);
                    sink.add(node, Arc::new(out));
                }
                Ok(())
            }
        });
        Ok(Loss { sums: Sums { loss: found.loss, right: found.right }, value })
    }
}
