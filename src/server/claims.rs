//! Claims: measured statements of papers.

use std::sync::Arc;

use prost::Message as _;
use tonic::{Request, Response, Status};

use super::{State, blocking, check, comparisons, convert, datasets, jobs};
use crate::error::{Error, Reason, Result};
use crate::proto::google::longrunning::Operation;
use crate::proto::v1;
use crate::proto::v1::claim_service_server::ClaimService;
use crate::recipe::claim;
use crate::store::operations::Kind;

/// Claims of a page at most.
const MAX_CLAIMS: usize = 500;

pub struct Claims(pub Arc<State>);

#[tonic::async_trait]
impl ClaimService for Claims {
    async fn run_claim(
        &self,
        request: Request<v1::RunClaimRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let fingerprint = request.encode_to_vec();
        check::request_id(&request.request_id)?;
        let known = self.0.repeated(Kind::Claim, &request.request_id, &fingerprint).await?;
        if let Some(known) = known {
            return Ok(known);
        }
        if let Some(checkout) = &request.checkout {
            check::display_name("checkout.commit", &checkout.commit)?;
        }
        let given = request.claim.clone().unwrap_or_default();
        let given = blocking(move || {
            claim::check_text(&given).map_err(|e| e.within("claim"))?;
            Ok(given)
        })
        .await?;
        self.check_sources(&given, &mut request.model).await?;
        if let Some(result) = &request.confirm {
            check_result(result).map_err(|e| e.within("confirm"))?;
        }
        let mut comparison = match &request.confirm {
            Some(result) => claim::confirm::part(&given, result)?,
            None => claim::form(&given, request.short)?,
        };
        comparison.model.clone_from(&request.model);
        let (comparison, estimates) = comparisons::check(&self.0, comparison)
            .await
            .map_err(|e| e.within("claim.comparison"))?;
        let target = comparison.model.clone();
        if request.validate_only {
            let plan =
                comparisons::plan(&self.0, "claim.comparison", comparison, &estimates).await?;
            return Ok(Response::new(convert::validated("claim", target, &plan)));
        }
        let id = request.request_id.clone();
        Ok(jobs::submit(&self.0, Kind::Claim, target, &request, &id, fingerprint).await?)
    }

    async fn check_claim(
        &self,
        request: Request<v1::CheckClaimRequest>,
    ) -> Result<Response<v1::CheckClaimResponse>, Status> {
        let request = request.into_inner();
        let checked = blocking(move || {
            let given = request.claim.unwrap_or_default();
            claim::check_text(&given).map_err(|e| e.within("claim"))?;
            if let Some(result) = &request.result {
                check_result(result).map_err(|e| e.within("result"))?;
            }
            claim::verify::verify(&given, request.result.as_ref())
        });
        Ok(Response::new(checked.await?))
    }

    async fn render_claims(
        &self,
        request: Request<v1::RenderClaimsRequest>,
    ) -> Result<Response<v1::RenderClaimsResponse>, Status> {
        let request = request.into_inner();
        let page = blocking(move || {
            if request.claims.len() > MAX_CLAIMS {
                return Err(Error::field("claims", format!("more than {MAX_CLAIMS}")));
            }
            for (i, entry) in request.claims.iter().enumerate() {
                if let Some(result) = &entry.result {
                    let place = format!("claims[{i}].result");
                    check_result(result).map_err(|e| e.within(&place))?;
                }
            }
            Ok(claim::page::page(&request.claims))
        });
        Ok(Response::new(v1::RenderClaimsResponse { markdown: page.await? }))
    }
}

impl Claims {
    /// Checks that model and data are those that the claim names, and makes the model's name exact.
    async fn check_sources(&self, given: &v1::Claim, model: &mut String) -> Result<()> {
        let store = &self.0.store;
        let row = store.version(model).await?;
        if !given.model_digest.is_empty() && row.digest != given.model_digest {
            let problem = format!(
                "{} has the digest {}, the claim is about {}; import {} again",
                row.name(),
                row.digest,
                given.model_digest,
                given.model_source
            );
            return Err(Error::at(Reason::ModelUnsuitable, "model", problem));
        }
        *model = row.name();
        for (i, data) in given.data.iter().enumerate() {
            let field = format!("claim.data[{i}].dataset");
            let at = |e: Error| Error::at(e.reason(), field.clone(), e.message());
            let id = crate::store::names::dataset(&data.dataset).map_err(at)?;
            let row = store.dataset(id).await.map_err(at)?;
            if row.object.digest != data.digest {
                let problem = format!(
                    "'{}' is {}, the claim is about {}; import the file it names under another id",
                    data.dataset, row.object.digest, data.digest
                );
                return Err(Error::at(Reason::DatasetUnsuitable, field, problem));
            }
            // What it was imported with decides which records are read, and how.
            let asked = datasets::asked(data.layout.clone().unwrap_or_default());
            let kind = data.kind();
            let other = kind != v1::DatasetKind::Unspecified && kind != datasets::kind(row.kind);
            if row.asked != asked || other {
                let problem = format!(
                    "'{}' was imported with another kind or layout than the claim names; import its \
                     file again, under another id",
                    data.dataset
                );
                return Err(Error::at(Reason::DatasetUnsuitable, field, problem));
            }
        }
        Ok(())
    }
}

fn check_result(result: &v1::ClaimResult) -> Result<()> {
    let report = result.report.clone().unwrap_or_default();
    comparisons::sound(&report).map_err(|e| e.within("report"))
}
