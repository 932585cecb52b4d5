//! The tied axes of the families.

use super::{Axis, Graph, Id};
use crate::error::Result;
use crate::models::vision::Layer;
use crate::models::{decoder, vision};

/// Axes of a decoder's blocks. Channels inside of a feed-forward network are free; those of values are free
/// within a head, in the same order for all heads that share it.
///
/// # Errors
/// INTERNAL, for a configuration whose sizes do not fit each other.
pub fn decoder(config: &decoder::Config) -> Result<Graph> {
    let mut graph = Graph::default();
    let mut stream: Option<Id> = None;
    for layer in 0..config.layers.len() {
        let weight = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let bias = |part: &str| format!("model.layers.{layer}.{part}.bias");
        for (part, channels) in [
            ("self_attn.q_proj", config.query_channels()),
            ("self_attn.k_proj", config.key_channels()),
        ] {
            let id = graph.maker(Axis::rows(weight(part), channels));
            graph.fix(id, "rotary embedding turns pairs of its channels");
        }
        let size = config.head_dim;
        let shared = config.heads / config.kv_heads.max(1);
        for head in 0..config.kv_heads {
            let own = vec![head * size];
            let values = Axis::rows(weight("self_attn.v_proj"), size).at(own.clone());
            let values = graph.maker(values);
            if config.qkv_bias {
                let id = graph.other(Axis::rows(bias("self_attn.v_proj"), size).at(own));
                graph.tie(values, id)?;
            }
            let starts = (head * shared..(head + 1) * shared).map(|query| query * size).collect();
            let read = graph.other(Axis::columns(weight("self_attn.o_proj"), size).at(starts));
            graph.tie(values, read)?;
        }
        let inner = config.wide(layer);
        let gate = graph.maker(Axis::rows(weight("mlp.gate_proj"), inner));
        let up = graph.maker(Axis::rows(weight("mlp.up_proj"), inner));
        let down = graph.other(Axis::columns(weight("mlp.down_proj"), inner));
        graph.tie_all(gate, [up, down])?;
        if config.mlp_bias {
            for part in ["mlp.gate_proj", "mlp.up_proj"] {
                let id = graph.other(Axis::rows(bias(part), inner));
                graph.tie(gate, id)?;
            }
        }
        for part in ["self_attn.o_proj", "mlp.down_proj"] {
            let id = graph.maker(Axis::rows(weight(part), config.hidden));
            match stream {
                Some(stream) => graph.tie(stream, id)?,
                None => {
                    graph.fix(id, "the residual stream belongs to all blocks, embedding and head");
                    stream = Some(id);
                }
            }
        }
    }
    Ok(graph)
}

/// Axes of an image classifier. Channels between layers are free, with their norms and the depthwise filters
/// that follow; those of the images and the classes are not.
///
/// # Errors
/// INTERNAL, for a configuration whose sizes do not fit each other.
pub fn vision(config: &vision::Config) -> Result<Graph> {
    let mut graph = Graph::default();
    let mut before: Option<Id> = None;
    for (i, layer) in config.layers.iter().enumerate() {
        let place = |part: &str| format!("layers.{i}.{part}");
        let norm = |graph: &mut Graph, made: Id, part: &str, channels: usize| -> Result<()> {
            for own in ["weight", "bias", "running_mean", "running_var"] {
                let id = graph.other(Axis::rows(place(&format!("{part}.{own}")), channels));
                graph.tie(made, id)?;
            }
            Ok(())
        };
        let (inputs, outputs) = (layer.inputs(), layer.outputs());
        let (read, made) = match layer {
            Layer::Plain { .. } => {
                // A column for each channel of each tap.
                let taps = (0..9).map(|tap| tap * inputs).collect();
                let columns = Axis::columns(place("conv.weight"), inputs).at(taps);
                let read = graph.other(columns);
                let made = graph.maker(Axis::rows(place("conv.weight"), outputs));
                norm(&mut graph, made, "norm", outputs)?;
                (read, made)
            }
            Layer::Separable { .. } => {
                let filters = graph.other(Axis::rows(place("depthwise.weight"), inputs));
                norm(&mut graph, filters, "depthwise_norm", inputs)?;
                let columns = graph.other(Axis::columns(place("pointwise.weight"), inputs));
                graph.tie(filters, columns)?;
                let made = graph.maker(Axis::rows(place("pointwise.weight"), outputs));
                norm(&mut graph, made, "pointwise_norm", outputs)?;
                (filters, made)
            }
        };
        match before {
            Some(before) => graph.tie(before, read)?,
            None => graph.fix(read, "the channels of the images"),
        }
        before = Some(made);
    }
    let read = graph.other(Axis::columns("classifier.weight", config.features()));
    match before {
        Some(before) => graph.tie(before, read)?,
        None => graph.fix(read, "the channels of the images"),
    }
    let classes = graph.maker(Axis::rows("classifier.weight", config.classes));
    graph.fix(classes, "the classes are what the labels of the data count");
    Ok(graph)
}
