//! The page of all claims, in Markdown.

use super::judge::word;
use crate::eval::format;
use crate::proto::v1::{self, FindingVerdict};
use crate::recipe::compare::{picture, table};

/// One table over all claims, then each with its arms. Written for `docs/claims.md`: pictures are looked
/// for beside the results, in `../claims/<name>/`.
pub fn page(claims: &[v1::MeasuredClaim]) -> String {
    let mut out = String::from(
        "# Claims\n\nWhat papers say, and what was measured here. This page is written by `planish claims \
         table` from the\nfiles `claims/*/result.json`, which `planish claims run` writes; `planish claims \
         check` finds edited and\nstale ones. A claim is *reproduced* when every expected effect holds with \
         its whole 95 % interval, *partly*\nwhen its headlines do, *not* when a headline fails, *unclear* \
         when an interval holds the bound.\n\n\
         | claim | the paper says | measured here | verdict | minutes |\n|---|---|---|---|---:|\n",
    );
    for entry in claims {
        out += &overview(entry);
    }
    for entry in claims {
        out += &section(entry);
    }
    out
}

fn overview(entry: &v1::MeasuredClaim) -> String {
    let claim = entry.claim.clone().unwrap_or_default();
    let (measured, verdict, minutes) = match &entry.result {
        None => ("never run".to_owned(), "-".to_owned(), String::new()),
        Some(result) => {
            let headlines = result.findings.iter().filter(|f| f.headline);
            let found: Vec<_> = headlines.map(|f| format!("{}: {}", f.effect, number(f))).collect();
            (found.join("; "), verdict_of(result), format!("{:.0}", result.minutes))
        }
    };
    format!(
        "| [{name}](#{name}) | {} | {} | {verdict} | {minutes} |\n",
        cell(&claim.statement),
        cell(&measured),
        name = claim.name,
    )
}

fn verdict_of(result: &v1::ClaimResult) -> String {
    let short = if result.short { " (short form)" } else { "" };
    format!("{}{short}", word(result.verdict()))
}

fn section(entry: &v1::MeasuredClaim) -> String {
    let claim = entry.claim.clone().unwrap_or_default();
    let mut out = format!("\n## {}\n\n{}.", claim.name, claim.system);
    for paper in &claim.papers {
        out += &format!(" {paper}.");
    }
    out += &format!("\n\n> {}\n", claim.statement.trim());
    out += &format!("\n`planish claims run {}`", claim.name);
    let Some(result) = &entry.result else { return out + "\n\nNever run.\n" };
    out += &format!(
        " took {:.0} minutes; the verdict is **{}**.\n\n| effect | measured | bound | |\n|---|---:|---:|---|\n",
        result.minutes,
        verdict_of(result)
    );
    for (finding, expectation) in result.findings.iter().zip(&claim.expectations) {
        let headline = if finding.headline { "**" } else { "" };
        let sign = match expectation.relation() {
            v1::Relation::RatioAtLeast
            | v1::Relation::DifferenceAtLeast
            | v1::Relation::ValueAtLeast
            | v1::Relation::GapClosedAtLeast => "≥",
            _ => "≤",
        };
        out += &format!(
            "| {headline}{}{headline} | {} | {sign} {} | {} |\n",
            cell(&finding.effect),
            number(finding),
            format::significant(finding.bound),
            match finding.verdict() {
                FindingVerdict::Holds => "holds",
                FindingVerdict::Fails => "fails",
                FindingVerdict::Unclear => "unclear",
                FindingVerdict::Unspecified => "not measured",
            }
        );
    }
    let report = result.report.clone().unwrap_or_default();
    out += &format!("\n{}", table::markdown(&report));
    let drawn = [
        ("bytes", picture::against_bytes(&report).is_ok()),
        ("latency", picture::against_latency(&report).is_ok()),
    ];
    for (name, _) in drawn.iter().filter(|(_, drawn)| *drawn) {
        out += &format!("\n![quality against {name}](../claims/{}/{name}.svg)\n", claim.name);
    }
    for remark in &claim.remarks {
        out += &format!("\n- {}", remark.trim());
    }
    if !claim.remarks.is_empty() {
        out.push('\n');
    }
    out += &format!("\n{}\n", provenance(result, &report));
    for renewal in &result.renewals {
        let methods: Vec<_> = renewal.method_code.keys().map(String::as_str).collect();
        out += &format!(
            "\nThe code of {} changed since; with it {} made the same numbers again (seed {}, {}).\n",
            sorted(methods),
            sorted(renewal.arms.iter().map(String::as_str).collect()),
            renewal.seed,
            commit(renewal.checkout.as_ref())
        );
    }
    out
}

/// Names in one order.
fn sorted(mut names: Vec<&str>) -> String {
    names.sort_unstable();
    names.join(", ")
}

fn commit(checkout: Option<&v1::Checkout>) -> String {
    match checkout.and_then(|c| Some((c.commit.get(..12)?, c.dirty))) {
        Some((commit, false)) => format!("commit {commit}"),
        Some((commit, true)) => format!("commit {commit} with changes"),
        None => "no commit known".to_owned(),
    }
}

/// Where and on what it was measured, in a few lines.
fn provenance(result: &v1::ClaimResult, report: &v1::ComparisonReport) -> String {
    let found = result.provenance.clone().unwrap_or_default();
    let commit = commit(found.checkout.as_ref());
    let seeds = report.comparison.iter().flat_map(|c| &c.seeds).map(u64::to_string);
    let mut data: Vec<_> = report
        .data_digests
        .iter()
        .map(|(name, digest)| format!("{name} {}", brief(digest)))
        .collect();
    data.sort();
    format!(
        "Base {} ({}); {}; seeds {}. planish {}, {commit}, {} threads, {}, {}, {}, {} memory; peak {}.",
        report.base,
        brief(&report.base_digest),
        data.join(", "),
        seeds.collect::<Vec<_>>().join(", "),
        found.code_version,
        found.threads,
        found.processor,
        found.instructions,
        found.system,
        format::size(found.memory_bytes),
        format::size(report.peak_memory_bytes),
    )
}

fn brief(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}

fn number(finding: &v1::Finding) -> String {
    finding.measured.as_ref().map(table::interval).unwrap_or_else(|| "not measured".to_owned())
}

/// Text that stays inside its cell.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::super::judge::judge;
    use super::super::testing::{claim, measured};
    use super::*;

    #[test]
    fn the_page_names_statement_numbers_and_verdict() {
        let claim = claim();
        let base = [2.0, 2.5, 3.0, 2.2];
        let report = measured(&claim, &base, &base.map(|v| v + 0.3), &base.map(|v| v + 0.2));
        let (findings, verdict) = judge(&claim, &report);
        let mut result =
            v1::ClaimResult { report: Some(report), findings, minutes: 12.4, ..Default::default() };
        result.set_verdict(verdict);
        let mut never = claim.clone();
        never.name = "never".into();
        let page = page(&[
            v1::MeasuredClaim { claim: Some(claim), result: Some(result) },
            v1::MeasuredClaim { claim: Some(never), result: None },
        ]);
        for part in [
            "| [small](#small) | says something | wanda against round: 1.11",
            "| reproduced | 12 |",
            "| [never](#never) | says something | never run | - |  |",
            "| **wanda against round** | 1.11",
            "| ≤ 1.20 | holds |",
            "| wanda | ",
            "seeds 0, 1, 2",
            "no commit known",
        ] {
            assert!(page.contains(part), "{part}\n{page}");
        }
    }

    #[test]
    fn text_stays_in_its_cell() {
        assert_eq!(cell("a |\n b"), "a \\| b");
    }
}
