//! The two files of an adapter as they are: read and written without a byte changed.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use ::safetensors::tensor::{Dtype as FileDtype, TensorView};
use serde_json::{Map, Value};

use super::{CONFIG, MAX_CONFIG, WEIGHTS, malformed, safetensors};
use crate::error::{Error, Reason, Result};
use crate::formats::replacement::Replacement;
use crate::kernels::cast;
use crate::nn::dtype::Dtype;

/// The files of an adapter.
#[derive(Debug, Clone)]
pub struct Folder {
    /// `adapter_config.json`, byte for byte.
    pub config: Vec<u8>,
    pub tensors: BTreeMap<String, safetensors::Tensor>,
    pub metadata: BTreeMap<String, String>,
}

impl Folder {
    /// From settings and f32 tensors, as the PEFT library would write them: sorted keys, two spaces.
    ///
    /// # Errors
    /// INTERNAL for tensors whose elements do not fill their shape.
    pub fn new(config: Map<String, Value>, tensors: BTreeMap<String, Plain>) -> Result<Self> {
        let mut config = Value::Object(config);
        config.sort_all_objects();
        let config = serde_json::to_vec_pretty(&config).map_err(|e| {
            Error::internal("the settings of an adapter cannot be written").with_source(e)
        })?;
        let mut all = BTreeMap::new();
        for (name, plain) in tensors {
            if plain.shape.iter().product::<usize>() != plain.values.len() {
                return Err(Error::internal(format!(
                    "tensor '{name}' has {} elements for {:?}",
                    plain.values.len(),
                    plain.shape
                )));
            }
            all.insert(name, plain.into_tensor());
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        Ok(Self { config, tensors: all, metadata })
    }

    /// Reads the two files of a folder.
    ///
    /// # Errors
    /// SOURCE_UNAVAILABLE for a missing file, MALFORMED_FILE for what breaks the form.
    pub fn read(folder: &Path) -> Result<Self> {
        for (name, what) in [(CONFIG, "its settings"), (WEIGHTS, "its factors")] {
            if !folder.join(name).is_file() {
                let pickle = folder.join("adapter_model.bin").is_file();
                let hint = if pickle && name == WEIGHTS {
                    "adapter_model.bin is a pickle, which can run code and is not read: save the \
                     adapter again with safe_serialization"
                } else {
                    "name the folder that save_pretrained wrote"
                };
                return Err(Error::new(
                    Reason::SourceUnavailable,
                    format!("the adapter lacks {name} with {what}; {hint}"),
                ));
            }
        }
        Self::open(&folder.join(CONFIG), &folder.join(WEIGHTS))
    }

    /// Reads the two files wherever they lie.
    ///
    /// # Errors
    /// MALFORMED_FILE for what breaks the form, IO.
    pub fn open(config: &Path, weights: &Path) -> Result<Self> {
        if std::fs::metadata(config)?.len() > MAX_CONFIG {
            return Err(malformed(format!("{CONFIG} has more than {MAX_CONFIG} bytes")));
        }
        let file = safetensors::open(weights)?;
        let config = std::fs::read(config)?;
        Ok(Self { config, tensors: file.tensors, metadata: file.metadata })
    }

    /// Writes the two files, each whole or not at all. Equal content gives equal bytes, those that the
    /// PEFT library writes.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.write_as(folder, CONFIG, WEIGHTS)
    }

    /// The same under other names.
    pub fn write_as(&self, folder: &Path, config: &str, weights: &str) -> Result<()> {
        use std::io::Write as _;
        let mut views = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in &self.tensors {
            let view =
                TensorView::new(file_dtype(tensor.dtype), tensor.shape.clone(), &tensor.data)
                    .map_err(|e| {
                        Error::internal(format!("tensor '{name}' cannot be written")).with_source(e)
                    })?;
            views.push((name.as_str(), view));
        }
        let metadata: HashMap<String, String> = self.metadata.clone().into_iter().collect();
        let bytes = ::safetensors::serialize(views, (!metadata.is_empty()).then_some(metadata))
            .map_err(|e| {
                Error::internal("the factors of an adapter cannot be written").with_source(e)
            })?;
        for (name, bytes) in [(weights, &bytes), (config, &self.config)] {
            let mut file = Replacement::new(&folder.join(name))?;
            file.as_file_mut().write_all(bytes)?;
            file.commit()?;
        }
        Ok(())
    }

    /// The tensors as a parsed file.
    pub fn file(&self) -> safetensors::File {
        safetensors::File { tensors: self.tensors.clone(), metadata: self.metadata.clone() }
    }
}

/// An f32 tensor in row order.
#[derive(Debug, Clone, PartialEq)]
pub struct Plain {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Plain {
    pub fn new(shape: &[usize], values: Vec<f32>) -> Self {
        Self { shape: shape.to_vec(), values }
    }

    /// As it is stored.
    pub fn into_tensor(self) -> safetensors::Tensor {
        let data = cast::to_bytes(self.values);
        safetensors::Tensor { dtype: Dtype::F32, shape: self.shape, data }
    }

    /// The elements of a float tensor; not finite ones and other types are refused by `name`.
    pub fn of(name: &str, tensor: &safetensors::Tensor) -> Result<Self> {
        Ok(Self { shape: tensor.shape.clone(), values: super::floats(name, tensor)? })
    }
}

fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::F16 => FileDtype::F16,
        Dtype::BF16 => FileDtype::BF16,
        Dtype::I64 => FileDtype::I64,
        Dtype::I32 => FileDtype::I32,
        Dtype::I16 => FileDtype::I16,
        Dtype::I8 => FileDtype::I8,
        Dtype::U32 => FileDtype::U32,
        Dtype::U16 => FileDtype::U16,
        Dtype::U8 => FileDtype::U8,
    }
}
