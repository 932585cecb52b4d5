//! Cutting the ranks of a diagonal core that came out as zero: what stays is a smaller LoRA.

use super::module::{Core, Factor, Module, Part};
use super::tuned::Tuned;
use crate::error::Result;

/// Folds the diagonals into `B` and cuts the ranks that are zero, scales unchanged; modules with no rank
/// left go. Cores that are no diagonals stay as they are.
pub fn cut(mut tuned: Tuned) -> Result<Tuned> {
    for (name, module) in std::mem::take(&mut tuned.modules) {
        if let Some(module) = folded(module)? {
            tuned.modules.insert(name, module);
        }
    }
    Ok(tuned)
}

fn folded(module: Module) -> Result<Option<Module>> {
    let Core::Diagonal(core) = &module.core else { return Ok(Some(module)) };
    let core = core.values()?;
    let kept: Vec<usize> = (0..module.rank).filter(|i| core[*i] != 0.0).collect();
    if kept.is_empty() {
        return Ok(None);
    }
    let ([rows, cols], rank) = (module.shape, kept.len());
    let (a, b) = (module.a.values()?, module.b.values()?);
    let a: Vec<f32> = kept.iter().flat_map(|i| &a[i * cols..(i + 1) * cols]).copied().collect();
    let row = |row: &[f32]| -> Vec<f32> { kept.iter().map(|i| row[*i] * core[*i]).collect() };
    let b: Vec<f32> = b.chunks(module.rank).flat_map(row).collect();
    Ok(Some(Module {
        rank,
        a: Factor::Plain(Part::trained(a, &[rank, cols])?),
        b: Factor::Plain(Part::trained(b, &[rows, rank])?),
        core: Core::Identity,
        core_name: "",
        ..module
    }))
}

/// Ranks whose entry of the diagonal is not zero, and all ranks.
#[cfg(test)]
pub fn kept(tuned: &Tuned) -> Result<(usize, usize)> {
    let (mut kept, mut all) = (0, 0);
    for module in tuned.modules.values() {
        if let Core::Diagonal(core) = &module.core {
            kept += core.values()?.iter().filter(|v| **v != 0.0).count();
            all += module.rank;
        }
    }
    Ok((kept, all))
}
