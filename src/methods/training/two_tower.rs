//! A model of two towers as the loop sees it. A record is one token, the number of an image: first those to learn
//! from, then those to measure on. Each image of a batch gets a caption, the name of its class in a template that is
//! drawn by the batch's random numbers.
//!
//! A batch holds several images of a class, whose captions all fit: an image is to find every caption of its class
//! with the same chance, not its own alone, and so is a caption its images (`kernels::training::contrast`).

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use rand::Rng;

use super::net;
use crate::data::images::Images;
use crate::error::{Error, Result};
use crate::models::two_tower::graph::{Graph, Pairs};
use crate::models::two_tower::prompts::Prompts;
use crate::models::two_tower::{Config, plan};
use crate::nn::ops::{Loss, Pool, Tape};
use crate::seed::Stream;
use crate::train::batch::{Batch, Targets};
use crate::train::loss::{LossAndGradients, LossSums};
use crate::train::parameters::{Gradients, Parameters};
use crate::train::pass::InPlace;

/// Images and what they are called.
#[derive(Clone, Copy)]
pub struct Data<'a> {
    pub training: &'a Images,
    pub validation: Option<&'a Images>,
    pub prompts: &'a Prompts,
}

/// Two towers and their data.
pub struct Learner<'a> {
    pub config: &'a Config,
    pub graph: Graph<'a>,
    pub data: Data<'a>,
    pub losses: Rc<Cell<LossSums>>,
    pub pool: Pool,
}

impl Data<'_> {
    fn image(&self, number: u32) -> Result<&[u8]> {
        net::image((self.training, self.validation), number)
    }
}

impl Learner<'_> {
    fn pass(&self, tape: &Tape, batch: &Batch, parameters: &Parameters) -> Result<Loss> {
        let classes = match &batch.targets {
            Targets::Classes(classes) if batch.width == 1 && classes.len() == batch.rows => classes,
            _ => return Err(Error::internal("a batch that is not of images")),
        };
        let image = self.config.pixels();
        let mut patches = self.pool.take(batch.rows * image);
        for (number, out) in batch.tokens.iter().zip(patches.chunks_exact_mut(image)) {
            plan::patches(self.config, self.data.image(*number)?, out);
        }
        let prompts = self.data.prompts;
        let (texts, captions) =
            prompts.pick(&drawn(prompts, classes, &batch.random.child("captions")))?;
        let pairs = Pairs { patches, texts: &texts, captions: &captions, classes };
        self.graph.loss(tape, &InPlace(parameters), pairs)
    }
}

/// Numbers of captions of these classes, by templates that are drawn.
fn drawn(prompts: &Prompts, classes: &[u32], random: &Stream) -> Vec<usize> {
    let mut rng = random.rng();
    let each = prompts.each;
    classes.iter().map(|class| *class as usize * each + rng.random_range(0..each)).collect()
}

fn sums(loss: &Loss, batch: &Batch) -> LossSums {
    LossSums { loss: loss.sums.loss, count: batch.rows as u64, correct: loss.sums.right }
}

impl LossAndGradients for Learner<'_> {
    fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)> {
        let tape = Tape::new(&self.pool);
        let loss = self.pass(&tape, batch, parameters)?;
        let sums = sums(&loss, batch);
        let names: HashMap<_, _> =
            parameters.iter().map(|(name, p)| (p.var.id(), (&name[..], &p.var))).collect();
        let mut gradients = Gradients::new();
        let mut one = self.pool.take(1);
        one[0] = 1.0;
        tape.backward(&loss.value, one.into())?.collect(&names, &mut gradients)?;
        net::add(&self.losses, sums);
        Ok((sums, gradients))
    }

    fn loss(&mut self, batch: &Batch, parameters: &Parameters) -> Result<LossSums> {
        let tape = Tape::forgetful(&self.pool);
        let loss = self.pass(&tape, batch, parameters)?;
        Ok(sums(&loss, batch))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::data::captions::Captions;
    use crate::data::tokenizer::Tokenizer;
    use crate::models::two_tower::config::Config;

    #[test]
    fn captions_are_of_the_class_and_follow_the_random_numbers() {
        let config = serde_json::json!({ "model_type": "two_tower", "vocab_size": 256 });
        let config = Config::from_hugging_face(&config).unwrap();
        let captions = Captions {
            names: ["a", "b"].map(str::to_owned).to_vec(),
            templates: ["{}", "{}!", "{}?"].map(str::to_owned).to_vec(),
        };
        let pixels = vec![0; 2 * 784];
        let images =
            Images { height: 28, width: 28, channels: 1, pixels, classes: vec![0, 1], captions };
        let prompts = Prompts::with(&config, &Tokenizer::bytes().unwrap(), &images).unwrap();
        let classes: Vec<u32> = (0..60).map(|i| i % 2).collect();
        let draw = |seed: u64| drawn(&prompts, &classes, &Stream::root(seed));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(draw(1).iter().zip(&classes).all(|(at, class)| at / 3 == *class as usize));
        assert_eq!(draw(1).into_iter().collect::<BTreeSet<_>>().len(), 6, "every template comes");
    }
}
