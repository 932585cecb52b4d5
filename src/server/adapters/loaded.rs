//! The adapters of requests: named, checked, in memory.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::formats::{peft, safetensors};
use crate::methods::adapt::shapes::Shapes;
use crate::methods::adapt::stored::{Base, Ready, Stored};
use crate::models::decoder::plan::adapters::{Fitted, Mix};
use crate::models::{decoder, encoder};
use crate::proto::v1;
use crate::serve::adapters::{Held, Reading};
use crate::serve::head::Head;
use crate::server::{State, blocking};
use crate::store::adapters::AdapterRow;
use crate::store::models::VersionRow;
use crate::store::names;

/// Adapters of one request.
const MAX_ADAPTERS: usize = 8;
/// Largest weight of an adapter.
const MAX_WEIGHT: f32 = 100.0;

/// The adapters of a request on a version of a decoder.
///
/// # Errors
/// INVALID_FIELD for too many, names that come twice and weights out of range, RESOURCE_NOT_FOUND
/// for an unknown adapter, MODEL_UNSUITABLE for one of another model, UNSUPPORTED for one that does not
/// serve beside its base, LIMIT_REACHED where there is no room.
pub async fn resolve(state: &State, version: &VersionRow, uses: &[v1::AdapterUse]) -> Result<Mix> {
    let parts = held(state, version, uses).await?;
    let parts = parts.into_iter().filter_map(|(held, weight)| match held {
        Held::Decoder(fitted) => Some((fitted, weight)),
        // Of an encoder, which the caller refuses by itself.
        Held::Encoder(_) => None,
    });
    Ok(Mix::new(parts))
}

/// The adapters of a request on a version of an encoder, and their heads by the places of the adapters.
///
/// # Errors
/// As of [`resolve`].
pub async fn resolve_encoder(
    state: &State,
    version: &VersionRow,
    uses: &[v1::AdapterUse],
) -> Result<(encoder::plan::adapters::Mix, Vec<(usize, Arc<Head>)>)> {
    let (mut parts, mut heads) = (Vec::new(), Vec::new());
    for (index, (held, weight)) in held(state, version, uses).await?.into_iter().enumerate() {
        let Held::Encoder(reading) = held else { continue };
        parts.extend(reading.fitted.iter().map(|fitted| (Arc::clone(fitted), weight)));
        heads.extend(reading.head.iter().map(|head| (index, Arc::clone(head))));
    }
    Ok((encoder::plan::adapters::Mix::new(parts), heads))
}

async fn held(
    state: &State,
    version: &VersionRow,
    uses: &[v1::AdapterUse],
) -> Result<Vec<(Held, f32)>> {
    if uses.len() > MAX_ADAPTERS {
        return Err(Error::field("adapters", format!("more than {MAX_ADAPTERS} adapters")));
    }
    let mut seen = BTreeSet::new();
    let mut parts = Vec::with_capacity(uses.len());
    for (index, one) in uses.iter().enumerate() {
        let field = |name: &str| format!("adapters[{index}].{name}");
        let weight = one.weight.unwrap_or(1.0);
        check_weight(&field("weight"), weight)?;
        let at_name = |e: Error| Error::at(e.reason(), field("name"), e.message());
        let id = names::adapter(&one.name).map_err(at_name)?;
        if !seen.insert(id) {
            return Err(Error::field(field("name"), "comes twice; give it once with the sum"));
        }
        let row = state.store.adapter(id).await.map_err(at_name)?;
        check_model(&field("name"), &row, version)?;
        parts.push((load(state, &row, version).await?, weight));
    }
    Ok(parts)
}

/// Refuses weights out of range, and what is no number.
pub fn check_weight(field: &str, weight: f32) -> Result<()> {
    if (-MAX_WEIGHT..=MAX_WEIGHT).contains(&weight) {
        return Ok(());
    }
    Err(Error::field(field, format!("{weight} is outside -{MAX_WEIGHT} to {MAX_WEIGHT}")))
}

/// Refuses an adapter of another model.
pub fn check_model(field: &str, row: &AdapterRow, version: &VersionRow) -> Result<()> {
    if row.base_model == version.model {
        return Ok(());
    }
    Err(Error::at(
        Reason::ModelUnsuitable,
        field,
        format!(
            "{} was made for models/{}, not for models/{}; name an adapter of this model",
            row.name(),
            row.base_model,
            version.model
        ),
    ))
}

/// The version that an adapter was trained on or checked against; the newest of its model where that is gone.
pub async fn version(state: &State, row: &AdapterRow) -> Result<VersionRow> {
    match state.store.version(&row.base_version).await {
        Err(error) if error.reason() == Reason::ResourceNotFound => {
            state.store.version(&format!("models/{}", row.base_model)).await
        }
        base => base,
    }
}

/// An adapter in memory, made ready for a version of its model.
pub async fn load(state: &State, row: &AdapterRow, version: &VersionRow) -> Result<Held> {
    // Plain products are the same beside every version; of others the weights of the version decide.
    if row.method == v1::AdapterMethod::Lora && version.family != encoder::FAMILY {
        let open = || async {
            let paths = state.store.adapter_paths(row).await?;
            let (digest, config) = (row.digest.clone(), version.config.clone());
            blocking(move || {
                let missing =
                    || Error::new(Reason::StoreCorrupt, "an adapter lacks a file; import it again");
                let settings = std::fs::read(paths.get(peft::CONFIG).ok_or_else(missing)?)?;
                let factors = safetensors::open(paths.get(peft::WEIGHTS).ok_or_else(missing)?)?;
                let adapter = peft::parse(&settings, &factors)?;
                let config = decoder::Config::from_hugging_face(&config)?;
                Ok(Held::Decoder(Arc::new(Fitted::new(&digest, &adapter, &config)?)))
            })
            .await
        };
        return state.adapters.get(&row.digest, row.facts.resident_bytes, open).await;
    }
    let key = format!("{}@{}", row.digest, version.digest);
    let open = || async {
        let paths = state.store.adapter_paths(row).await?;
        let model = state.store.open_any_version(version).await?;
        let key = key.clone();
        blocking(move || {
            let stored = Stored::read(&paths, Base::Any, &model, &Shapes::of(&model)?)?;
            Ok(match stored.serving(&key, &model)? {
                Ready::Decoder(fitted) => Held::Decoder(Arc::new(fitted)),
                Ready::Encoder { fitted, head } => Held::Encoder(Arc::new(Reading {
                    fitted: fitted.map(Arc::new),
                    head: head.map(Arc::new),
                })),
            })
        })
        .await
    };
    state.adapters.get(&key, row.facts.resident_bytes, open).await
}
