//! The settings that tell the decoder architectures apart.

/// Nonlinearity of the gated feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    GeluTanh,
}

/// What a layer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    Global,
    Local,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f32,
    },
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        original: usize,
    },
    /// NTK scaling. Position `p >= original` is rotated with the frequencies of a sequence of `p + 1`
    /// positions, so that keys never depend on how a sequence was cut into steps.
    Dynamic {
        factor: f32,
        original: usize,
    },
    Yarn {
        factor: f32,
        original: usize,
        beta_fast: f32,
        beta_slow: f32,
        attention_factor: Option<f32>,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// Configuration of a decoder. Shapes: `hidden` = width of the residual stream; queries have
/// `heads * head_dim` channels, keys and values `kv_heads * head_dim`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `model_type` of the Hugging Face configuration: llama, mistral, qwen2, qwen3, gemma3_text.
    pub architecture: String,
    pub vocab: usize,
    pub hidden: usize,
    /// Channels inside of the feed-forward network of a block; of the widest, where they differ.
    pub intermediate: usize,
    /// The same by block, where they differ; otherwise empty.
    pub widths: Vec<usize>,
    pub layers: Vec<LayerKind>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_eps: f32,
    /// Norm weights are stored as offsets from 1 (Gemma).
    pub norm_offset: bool,
    /// Norms after attention and after the feed-forward network too (Gemma).
    pub post_norms: bool,
    pub activation: Activation,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// RMS norm over each head of q and k.
    pub qk_norm: bool,
    pub embedding_scale: f32,
    pub attention_scale: f32,
    pub rope: Rope,
    /// Rotary settings of local layers, where they differ.
    pub local_rope: Option<Rope>,
    /// Positions a local layer sees, itself included.
    pub window: Option<usize>,
    pub attention_softcap: Option<f32>,
    pub final_softcap: Option<f32>,
    /// The output head is the embedding matrix.
    pub tied: bool,
    pub max_positions: usize,
}

impl Config {
    /// Channels inside of the feed-forward network of block `layer`.
    pub fn wide(&self, layer: usize) -> usize {
        self.widths.get(layer).copied().unwrap_or(self.intermediate)
    }

    /// Sets the channels inside of the feed-forward network of each block.
    pub fn set_widths(&mut self, widths: &[usize]) {
        self.intermediate = widths.iter().copied().max().unwrap_or(self.intermediate);
        self.widths = match widths.iter().all(|w| *w == self.intermediate) {
            true => Vec::new(),
            false => widths.to_vec(),
        };
    }

    /// Channels of the queries.
    pub fn query_channels(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the keys, and of the values.
    pub fn key_channels(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Positions that layer `layer` sees, itself included; `None` means all before it.
    pub fn layer_window(&self, layer: usize) -> Option<usize> {
        match self.layers[layer] {
            LayerKind::Global => None,
            LayerKind::Local => self.window,
        }
    }

    /// Name of the tensor that multiplies the final hidden states.
    pub fn head_name(&self) -> &'static str {
        if self.tied { EMBEDDING } else { "lm_head.weight" }
    }

    /// Names of the linear weights of block `layer`, grouped by the input they share, in the order in
    /// which they run: q k v; o; gate up; down.
    pub fn linears(&self, layer: usize) -> Vec<Vec<String>> {
        [
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..],
            &["self_attn.o_proj"],
            &["mlp.gate_proj", "mlp.up_proj"],
            &["mlp.down_proj"],
        ]
        .iter()
        .map(|group| group.iter().map(|n| format!("model.layers.{layer}.{n}.weight")).collect())
        .collect()
    }

    /// Every tensor the model must have, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden;
        let (q, kv) = (self.query_channels(), self.key_channels());
        let mut all = vec![(EMBEDDING.to_owned(), vec![self.vocab, hidden])];
        for layer in 0..self.layers.len() {
            let wide = self.wide(layer);
            let mut add = |name: &str, shape: &[usize]| {
                all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            let linears = [
                ("self_attn.q_proj", q, hidden, self.qkv_bias),
                ("self_attn.k_proj", kv, hidden, self.qkv_bias),
                ("self_attn.v_proj", kv, hidden, self.qkv_bias),
                ("self_attn.o_proj", hidden, q, self.output_bias),
                ("mlp.gate_proj", wide, hidden, self.mlp_bias),
                ("mlp.up_proj", wide, hidden, self.mlp_bias),
                ("mlp.down_proj", hidden, wide, self.mlp_bias),
            ];
            for (name, rows, cols, bias) in linears {
                add(&format!("{name}.weight"), &[rows, cols]);
                if bias {
                    add(&format!("{name}.bias"), &[rows]);
                }
            }
            add("input_layernorm.weight", &[hidden]);
            add("post_attention_layernorm.weight", &[hidden]);
            if self.post_norms {
                add("pre_feedforward_layernorm.weight", &[hidden]);
                add("post_feedforward_layernorm.weight", &[hidden]);
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", &[self.head_dim]);
                add("self_attn.k_norm.weight", &[self.head_dim]);
            }
        }
        all.push((FINAL_NORM.to_owned(), vec![hidden]));
        if !self.tied {
            all.push((self.head_name().to_owned(), vec![self.vocab, hidden]));
        }
        all
    }
}

/// Name of the embedding matrix.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

/// Name of the norm before the head.
pub const FINAL_NORM: &str = "model.norm.weight";
