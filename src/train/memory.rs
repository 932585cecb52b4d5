//! What a run comes to hold in memory, said before it starts, and what it did hold.
//!
//! Beside the model's weights there are, in bytes: 4 for each trained number, 4 for its gradient (twice
//! while those of a further batch are added), what the optimiser remembers of it, 4 for an average where one
//! is kept, and what the backward pass needs of the forward pass, which [`Transformer`] estimates.

use super::optimizer::Optimizer;
use super::parameters::Parameters;
use super::settings::Settings;
use crate::error::{Error, Reason, Result};

/// Measures of a transformer that decide what its forward pass leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transformer {
    pub layers: usize,
    /// Width of the states.
    pub hidden: usize,
    /// Width of all queries of a token.
    pub query: usize,
    /// Width of all keys of a token.
    pub key_value: usize,
    /// Width inside the feed-forward part.
    pub inner: usize,
    /// Projections into the feed-forward part: 2 where there is a gate.
    pub gates: usize,
    /// Outputs of the head that are computed at once, with as many gradients.
    pub head: usize,
}

impl Transformer {
    /// Bytes that the backward pass of `tokens` tokens finds in memory. Of each block these are the inputs
    /// of its linear layers, norms and gates, queries, keys and values; attention weights are computed
    /// again. With `checkpointing`, the inputs of all blocks and the inside of one.
    pub fn activation_bytes(&self, tokens: usize, checkpointing: bool) -> u64 {
        // The input of the block, both norms' outputs, the state in the middle; queries and keys before and
        // after rotation, values; what attention gives; each gate, its product with the other, the output.
        let block =
            5 * self.hidden + 3 * self.query + 3 * self.key_value + (self.gates + 1) * self.inner;
        let kept = if checkpointing {
            self.layers * self.hidden + 2 * block
        } else {
            (self.layers + 1) * block
        };
        (kept as u64).saturating_mul(tokens as u64).saturating_add(2 * self.head as u64) * 4
    }
}

/// What a run comes to hold in memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimate {
    /// Frozen weights.
    pub weights: u64,
    pub parameters: u64,
    pub gradients: u64,
    pub optimizer: u64,
    pub average: u64,
    pub activations: u64,
}

impl Estimate {
    /// An estimate for `parameters`, of a model whose frozen weights have `weights` bytes and whose passes
    /// leave `activations` bytes behind.
    pub fn new(
        settings: &Settings,
        parameters: &Parameters,
        weights: u64,
        activations: u64,
    ) -> Self {
        let sizes: Vec<usize> = parameters.values().map(|p| p.var.elem_count()).collect();
        Self::of(settings, &sizes, weights, activations)
    }

    /// The same for trained tensors of so many elements.
    pub fn of(settings: &Settings, sizes: &[usize], weights: u64, activations: u64) -> Self {
        let optimizer = Optimizer::new(settings.rule, 0.0, settings.eight_bit);
        let elements = sizes.iter().fold(0, |sum: u64, size| sum.saturating_add(*size as u64));
        let bytes = elements.saturating_mul(size_of::<f32>() as u64);
        // Gradients are summed up, or scaled into memory of their own.
        let copies = if settings.accumulation > 1 { 2 } else { 1 };
        Self {
            weights,
            parameters: bytes,
            gradients: bytes.saturating_mul(copies),
            optimizer: sizes.iter().map(|size| optimizer.bytes(*size)).sum(),
            average: if settings.ema_decay.is_some() { bytes } else { 0 },
            activations,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let parts = self.parts().map(|(_, bytes)| bytes);
        parts.into_iter().fold(0, u64::saturating_add)
    }

    fn parts(&self) -> [(&'static str, u64); 6] {
        [
            ("weights", self.weights),
            ("trained tensors", self.parameters),
            ("gradients", self.gradients),
            ("optimiser", self.optimizer),
            ("average", self.average),
            ("activations", self.activations),
        ]
    }

    /// Refuses a run that would hold more than `budget` bytes, with what there is to lower.
    ///
    /// # Errors
    /// `LIMIT_REACHED`.
    pub fn check(&self, budget: u64, settings: &Settings) -> Result<()> {
        let total = self.total();
        if total <= budget {
            return Ok(());
        }
        let mut parts = self.parts().to_vec();
        parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, bytes)| *bytes * 20 > total)
            .map(|(name, bytes)| format!("{name} {}", size(*bytes)))
            .collect();
        let mut remedies = Vec::new();
        if self.activations > total / 4 {
            if !settings.checkpoint_activations {
                remedies.push("set checkpoint_activations");
            }
            if settings.batch_size > 1 {
                remedies.push("lower batch_size and raise accumulation as much");
            }
            remedies.push("lower max_length");
        }
        if self.optimizer + self.gradients + self.average > total / 4 {
            if !settings.eight_bit && settings.rule.moments() > 0 {
                remedies.push("set eight_bit in the optimizer");
            }
            if self.average > 0 {
                remedies.push("leave out ema_decay");
            }
            remedies.push("train fewer tensors or a lower rank");
        }
        if remedies.is_empty() {
            remedies.push("start from a smaller or quantised model");
        }
        Err(Error::new(
            Reason::LimitReached,
            format!(
                "training needs about {} of memory ({}), and {} may be used; {}",
                size(total),
                parts.join(", "),
                size(budget),
                remedies.join(", or ")
            ),
        ))
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0..10_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        10_000_000..1_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// Bytes that this process can still get: what the system has, within the limit of its control group. `None`
/// where the system does not say.
pub fn free() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = field(&info, "MemAvailable:")?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(most, now)| most.saturating_sub(now));
    Some(group.map_or(available, |group| group.min(available)))
}

/// Bytes of this process that are in memory; 0 where the system does not say.
pub fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    field(&status, "VmRSS:").unwrap_or_default()
}

/// A number in KiB from a text of the system, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::proto::v1;
    use crate::train::parameters::Parameter;

    fn parameters(elements: usize) -> Parameters {
        let var = Var::zeros(elements, DType::F32, &Device::Cpu).unwrap();
        Parameters::from([("a".to_owned(), Parameter { var, rate: 1.0, decay: true })])
    }

    fn settings(change: impl Fn(&mut v1::Training)) -> Settings {
        let mut training = v1::Training::default();
        change(&mut training);
        Settings::read(&training, 1e-3).unwrap()
    }

    #[test]
    fn every_part_is_counted() {
        let estimate = Estimate::new(&settings(|_| ()), &parameters(8192), 1000, 500);
        let wanted = Estimate {
            weights: 1000,
            parameters: 32_768,
            gradients: 32_768,
            optimizer: 65_536,
            average: 0,
            activations: 500,
        };
        assert_eq!(estimate, wanted);
        assert_eq!(estimate.total(), 1500 + 131_072);
        let small = settings(|t| {
            let adamw = v1::AdamW { eight_bit: true, ..Default::default() };
            t.optimizer = Some(v1::training::Optimizer::Adamw(adamw));
            t.accumulation = Some(2);
            t.ema_decay = Some(0.9);
        });
        let estimate = Estimate::new(&small, &parameters(8192), 0, 0);
        assert_eq!((estimate.optimizer, estimate.gradients), (2 * 8320, 65_536));
        assert_eq!(estimate.average, 32_768);
    }

    #[test]
    fn what_does_not_fit_says_what_to_lower() {
        let plain = settings(|_| ());
        let fits = Estimate { weights: 900, activations: 100, ..Default::default() };
        fits.check(1000, &plain).unwrap();
        let wide = Estimate { activations: 5_000_000_000, ..fits };
        let error = wide.check(2_000_000_000, &plain).unwrap_err();
        assert_eq!(error.reason(), Reason::LimitReached);
        for part in ["5.0 GB", "2.0 GB may", "checkpoint_activations", "batch_size", "max_length"] {
            assert!(error.message().contains(part), "{part}: {error}");
        }
        assert!(!error.message().contains("eight_bit"), "{error}");
        let deep = Estimate { optimizer: 4_000_000, gradients: 2_000_000, ..fits };
        let error = deep.check(1000, &plain).unwrap_err();
        assert!(error.message().contains("eight_bit"), "{error}");
        assert!(!error.message().contains("max_length"), "{error}");
        let heavy = Estimate { weights: u64::MAX, optimizer: 5, ..fits };
        let error = heavy.check(1000, &plain).unwrap_err();
        assert!(error.message().contains("quantised"), "{error}");
    }

    #[test]
    fn checkpointing_keeps_inputs_and_one_block() {
        let shape = Transformer {
            layers: 30,
            hidden: 576,
            query: 576,
            key_value: 192,
            inner: 1536,
            gates: 2,
            head: 0,
        };
        // 5 * 576 + 3 * 576 + 3 * 192 + 3 * 1536 = 9792 numbers a block and token.
        assert_eq!(shape.activation_bytes(1, false), 31 * 9792 * 4);
        assert_eq!(shape.activation_bytes(1, true), (30 * 576 + 2 * 9792) * 4);
        assert_eq!(shape.activation_bytes(3, false), 3 * 31 * 9792 * 4);
    }

    #[test]
    fn the_system_is_asked() {
        assert_eq!(field("VmRSS:\t 3 kB\nx", "VmRSS:"), Some(3072));
        assert_eq!(field("VmRSS: x kB", "VmRSS:"), None);
        #[cfg(target_os = "linux")]
        {
            assert!(free().is_some_and(|bytes| bytes > 0));
            assert!(resident() > 1 << 20);
        }
    }
}
