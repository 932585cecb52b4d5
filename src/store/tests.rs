//! The store as a whole, with made-up objects in the place of models.

use std::collections::BTreeMap;

use object_store::memory::InMemory;
use serde_json::json;

use super::datasets::DatasetKind;
use super::models::{Facts, NewVersion, version_digest};
use super::objects::{Object, Objects};
use super::operations::{End, Kind, NewOperation, Operation, State};
use super::*;
use crate::data::records::{Checked, Layout};
use crate::progress::Metrics;
use crate::proto::v1;

async fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).await.unwrap();
    (folder, store)
}

async fn put(store: &Store, content: &str) -> Object {
    let mut upload = store.objects.upload(1 << 20).await.unwrap();
    upload.write(content.as_bytes()).await.unwrap();
    upload.finish(None, None).await.unwrap()
}

async fn new_version(store: &Store, model: &str, contents: &[&str]) -> NewVersion {
    let mut files = Vec::new();
    for (i, content) in contents.iter().enumerate() {
        files.push((format!("file-{i}"), put(store, content).await));
    }
    NewVersion {
        model: model.to_owned(),
        display_name: "a model".to_owned(),
        facts: Facts {
            family: "decoder".to_owned(),
            architecture: "llama".to_owned(),
            config: json!({"hidden_size": 8}),
            parameters: 10,
            weight_bytes: 40,
            layout_bytes: BTreeMap::from([("dense".to_owned(), 40)]),
        },
        files,
        lineage: v1::Lineage::default(),
        place: 0,
    }
}

async fn version(store: &Store, model: &str, contents: &[&str]) -> models::VersionRow {
    let new = new_version(store, model, contents).await;
    store.commit_version(new).await.unwrap()
}

fn operation(target: &str, request_id: &str) -> NewOperation {
    NewOperation {
        kind: Kind::Recipe,
        target: target.to_owned(),
        request: b"resolved".to_vec(),
        request_id: request_id.to_owned(),
        fingerprint: b"as sent".to_vec(),
    }
}

async fn enqueue(store: &Store, target: &str) -> Operation {
    store.enqueue(&operation(target, ""), &[target.to_owned()], 100).await.unwrap()
}

async fn there(store: &Store, object: &Object) -> bool {
    store.objects.find(&object.digest).await.unwrap().is_some()
}

fn files_below(folder: &Path) -> usize {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .fold(0, |n, path| n + if path.is_dir() { files_below(&path) } else { 1 })
}

fn reason<T: std::fmt::Debug>(result: Result<T>) -> Reason {
    result.unwrap_err().reason()
}

#[tokio::test]
async fn reopening_keeps_everything_and_one_process_holds_the_folder() {
    let (folder, store) = open().await;
    let row = version(&store, "m", &["a", "b"]).await;
    assert_eq!(row.name(), "models/m/versions/1");
    store.ping().await.unwrap();
    assert!(store._lock.metadata().is_ok());
    let second = File::create(folder.path().join("planish.lock")).unwrap();
    assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)));
    drop(second);
    drop(store);
    let store = Store::open(folder.path()).await.unwrap();
    assert_eq!(store.version("models/m").await.unwrap(), row);
}

#[tokio::test]
async fn uploads_are_checked_and_leave_nothing_when_they_fail() {
    let (folder, store) = open().await;
    let objects = folder.path().join("objects");
    // SHA-256 of "abc", from the standard's own example.
    let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let mut upload = store.objects.upload(3).await.unwrap();
    upload.write(b"a").await.unwrap();
    upload.write(b"bc").await.unwrap();
    let object = upload.finish(Some(3), Some(abc)).await.unwrap();
    assert_eq!((object.digest.as_str(), object.size), (abc, 3));
    let path = store.objects.local_path(abc).await.unwrap();
    assert!(path.ends_with(format!("objects/ba/{}", &abc[9..])));
    assert_eq!(std::fs::read(path).unwrap(), b"abc");

    let mut upload = store.objects.upload(3).await.unwrap();
    upload.write(b"abc").await.unwrap();
    assert_eq!(reason(upload.write(b"d").await), Reason::TooLarge);
    assert_eq!(reason(upload.write(b"").await), Reason::Io);
    drop(upload);
    let mut upload = store.objects.upload(9).await.unwrap();
    upload.write(b"abd").await.unwrap();
    assert_eq!(reason(upload.finish(None, Some(abc)).await), Reason::DigestMismatch);
    let mut upload = store.objects.upload(9).await.unwrap();
    upload.write(b"abcd").await.unwrap();
    assert_eq!(reason(upload.finish(Some(3), None).await), Reason::DigestMismatch);
    let mut upload = store.objects.upload(9).await.unwrap();
    upload.write(b"half").await.unwrap();
    drop(upload);
    assert_eq!(files_below(&objects), 1);

    // What a dead process left is gone after the next start; a held object is not.
    std::fs::write(objects.join("staging/left"), b"x").unwrap();
    drop(store);
    let store = Store::open(folder.path()).await.unwrap();
    assert_eq!(files_below(&objects), 1);
    assert!(there(&store, &object).await);
}

#[tokio::test]
async fn damaged_and_missing_objects_are_told() {
    let (_folder, store) = open().await;
    let object = put(&store, "content").await;
    let path = store.objects.local_path(&object.digest).await.unwrap();
    std::fs::write(&path, "other size").unwrap();
    assert_eq!(reason(store.objects.local_path(&object.digest).await), Reason::StoreCorrupt);
    // Handing the content in again heals it.
    put(&store, "content").await;
    assert_eq!(std::fs::read(&path).unwrap(), b"content");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(reason(store.objects.local_path(&object.digest).await), Reason::StoreCorrupt);
    assert_eq!(store.objects.find(&object.digest).await.unwrap(), None);
    assert_eq!(store.objects.find("sha256:../../etc").await.unwrap(), None);
}

#[tokio::test]
async fn a_remote_store_behaves_as_the_folder_does() {
    let (folder, store) = open().await;
    let remote = std::sync::Arc::new(InMemory::new());
    let staging = folder.path().join("cache");
    let objects = Objects::remote(remote, staging.clone(), store.sql.clone()).unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "content").unwrap();
    let object = objects.put_file(&file, None).await.unwrap();
    assert!(!file.exists());
    assert_eq!(files_below(&staging), 0);
    for _ in 0..2 {
        let path = objects.local_path(&object.digest).await.unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"content");
    }
    assert_eq!(objects.find(&object.digest).await.unwrap().as_ref(), Some(&object));
    objects.release(&object).await.unwrap();
    assert_eq!(objects.find(&object.digest).await.unwrap(), None);
}

#[tokio::test]
async fn deleting_collects_objects_that_nothing_else_uses() {
    let (_folder, store) = open().await;
    let first = version(&store, "m", &["shared", "own"]).await;
    let second = version(&store, "n", &["shared"]).await;
    let (shared, own) = (&first.files[0].1, &first.files[1].1);
    assert_eq!(&second.files[0].1, shared);
    let upload = put(&store, "not used yet").await;

    store.delete_model("m", None).await.unwrap();
    assert!(there(&store, shared).await);
    assert!(!there(&store, own).await);
    assert!(there(&store, &upload).await, "uploads are held for a while");
    store.delete_version("models/n/versions/1").await.unwrap();
    assert!(!there(&store, shared).await);
    assert_eq!(store.model("n").await.unwrap().versions, 0);
    assert_eq!(reason(store.version("models/n").await), Reason::ResourceNotFound);
    assert_eq!(reason(store.version("models/m").await), Reason::ResourceNotFound);

    // Numbers are not given twice.
    assert_eq!(version(&store, "n", &["x"]).await.version, 2);
}

#[tokio::test]
async fn collection_never_takes_what_is_being_written() {
    let (_folder, store) = open().await;
    let store = std::sync::Arc::new(store);
    let writer = |model: &'static str| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..12 {
                let row = version(&store, model, &["contended"]).await;
                let path = store.objects.local_path(&row.files[0].1.digest).await.unwrap();
                assert_eq!(std::fs::read(path).unwrap(), b"contended");
                store.delete_version(&row.name()).await.unwrap();
            }
        })
    };
    let (a, b) = (writer("a"), writer("b"));
    a.await.unwrap();
    b.await.unwrap();
    assert_eq!(store.objects.collect().await.unwrap(), 0);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM objects")
        .fetch_one(&store.sql.reader)
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn uploads_that_nobody_came_for_go_when_their_time_is_over() {
    let (_folder, store) = open().await;
    let forgotten = put(&store, "forgotten").await;
    let row = version(&store, "m", &["used"]).await;
    let used = put(&store, "used").await;
    let wanted = put(&store, "wanted").await;
    let import = operation("models/n", "");
    let import = store.enqueue(&import, std::slice::from_ref(&wanted.digest), 9).await.unwrap();
    store.sweep().await;
    assert!(there(&store, &forgotten).await);
    let mut tx = store.sql.write().await.unwrap();
    sqlx::query("UPDATE leases SET expires_ms = 0").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    store.sweep().await;
    assert!(!there(&store, &forgotten).await);
    assert!(there(&store, &used).await, "{} has it", row.name());
    assert!(there(&store, &wanted).await, "a waiting operation needs it");
    store.request_cancel(&import.id).await.unwrap();
    store.sweep().await;
    assert!(!there(&store, &wanted).await);
}

#[tokio::test]
async fn a_step_is_written_once() {
    let (_folder, store) = open().await;
    let step = |index| v1::Lineage {
        operation: "operations/op".into(),
        step_index: index,
        seconds: 1.5,
        ..Default::default()
    };
    let mut rows = Vec::new();
    for (content, index) in [("one", 0), ("again", 0), ("two", 1)] {
        let mut new = new_version(&store, "m", &[content]).await;
        (new.lineage, new.place) = (step(index), index);
        rows.push(store.commit_version(new).await.unwrap());
    }
    assert_eq!(rows[0], rows[1]);
    assert_eq!(rows[2].version, 2);
    assert_eq!(rows[2].lineage().unwrap(), step(1));
    assert_eq!(store.step_version("operations/op", 0).await.unwrap().as_ref(), Some(&rows[0]));
    assert_eq!(store.step_version("operations/op", 2).await.unwrap(), None);
    let held: i64 = sqlx::query_scalar("SELECT count(*) FROM objects")
        .fetch_one(&store.sql.reader)
        .await
        .unwrap();
    assert_eq!(held, 2, "the object of the second try is gone");
}

#[test]
fn a_version_digest_depends_on_names_and_contents_only() {
    let file = |name: &str, byte: char| {
        let digest = format!("sha256:{}", byte.to_string().repeat(64));
        (name.to_owned(), Object { digest, size: 1 })
    };
    let one = version_digest(&[file("a", '1'), file("b", '2')]);
    assert_eq!(one, version_digest(&[file("b", '2'), file("a", '1')]));
    assert_ne!(one, version_digest(&[file("a", '2'), file("b", '1')]));
    // printf 'a\0sha256:11..1\nb\0sha256:22..2\n' | sha256sum
    assert_eq!(one, "sha256:9e7027cb2dc2a6b72e0c447ed09d2c909a87fe037444dfdddbc22df71c8d87ea");
}

#[tokio::test]
async fn etags_guard_changes() {
    let (_folder, store) = open().await;
    version(&store, "m", &["a"]).await;
    let old = store.model("m").await.unwrap();
    let labels = BTreeMap::from([("team".to_owned(), "ü".to_owned())]);
    let new = store.update_model("m", Some("new"), Some(&labels), Some(&old.etag)).await.unwrap();
    assert_eq!((new.display_name.as_str(), &new.labels), ("new", &labels));
    assert_ne!(new.etag, old.etag);
    let stale = store.update_model("m", Some("x"), None, Some(&old.etag)).await;
    assert_eq!(reason(stale), Reason::EtagMismatch);
    assert_eq!(reason(store.delete_model("m", Some(&old.etag)).await), Reason::EtagMismatch);
    let row = version(&store, "m", &["b"]).await;
    assert_eq!(row.version, 2);
    let now = store.model("m").await.unwrap();
    assert_eq!((now.latest, now.versions, now.display_name.as_str()), (Some(2), 2, "new"));
    assert_ne!(now.etag, new.etag, "a new version changes the model");
    store.delete_model("m", Some(&now.etag)).await.unwrap();
    assert_eq!(reason(store.delete_model("m", None).await), Reason::ResourceNotFound);
}

#[tokio::test]
async fn pages_walk_over_everything_once() {
    let (_folder, store) = open().await;
    for model in ["c", "a", "b"] {
        version(&store, model, &["x"]).await;
    }
    version(&store, "a", &["y"]).await;
    let mut after = None;
    let mut seen = Vec::new();
    loop {
        let page = store.models(after.as_deref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        seen.extend(page.into_iter().map(|row| row.id));
    }
    assert_eq!(seen, ["a", "b", "c"]);
    let newest = store.versions("a", None, 1).await.unwrap();
    assert_eq!(newest[0].version, 2);
    assert_eq!(store.versions("a", Some(2), 5).await.unwrap()[0].version, 1);
    assert!(store.versions("a", Some(1), 5).await.unwrap().is_empty());
    assert_eq!(reason(store.versions("none", None, 5).await), Reason::ResourceNotFound);

    let mut ids: Vec<_> = Vec::new();
    for _ in 0..5 {
        ids.push(enqueue(&store, "models/a").await.id);
    }
    let (mut before, mut walked): (Option<(i64, String)>, Vec<String>) = (None, Vec::new());
    loop {
        let position = before.as_ref().map(|(ms, id)| (*ms, id.as_str()));
        let page = store.operations(position, 2, Some(false)).await.unwrap();
        let Some(last) = page.last() else { break };
        before = Some((last.created_ms, last.id.clone()));
        walked.extend(page.into_iter().map(|row| row.id));
    }
    walked.sort();
    ids.sort();
    assert_eq!(walked, ids);
    assert!(store.operations(None, 10, Some(true)).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_data_set_is_made_once() {
    let (_folder, store) = open().await;
    let object = put(&store, "text").await;
    let insert = |id: &'static str, request: &'static str, object: &Object| {
        let (store, object) = (&store, object.clone());
        async move {
            let file = (DatasetKind::Text, "a.txt").into();
            let checked = Checked { layout: Layout::default(), records: 1, skipped: 0 };
            store.insert_dataset(id, "", &file, &object, &checked, request).await
        }
    };
    let (row, new) = insert("d", "r", &object).await.unwrap();
    assert!(new);
    assert_eq!((row.records, &row.object), (1, &object));
    assert_eq!(insert("d", "r", &object).await.unwrap(), (row.clone(), false));
    assert_eq!(reason(insert("e", "r", &object).await), Reason::RequestIdReused);
    assert_eq!(reason(insert("d", "", &object).await), Reason::ResourceExists);
    insert("e", "", &object).await.unwrap();
    assert_eq!(store.datasets(Some("d"), 9).await.unwrap()[0].id, "e");

    let needs = ["datasets/d".to_owned()];
    let operation = store.enqueue(&operation("models/m", ""), &needs, 9).await.unwrap();
    assert_eq!(reason(store.delete_dataset("d", None).await), Reason::ResourceInUse);
    store.request_cancel(&operation.id).await.unwrap();
    assert_eq!(reason(store.delete_dataset("d", Some("x")).await), Reason::EtagMismatch);
    store.delete_dataset("d", Some(&row.etag)).await.unwrap();
    assert!(there(&store, &object).await);
    store.delete_dataset("e", None).await.unwrap();
    assert!(!there(&store, &object).await);
}

#[tokio::test]
async fn what_is_in_use_is_not_deleted() {
    let (_folder, store) = open().await;
    let base = version(&store, "m", &["a"]).await;
    let mut child = new_version(&store, "m", &["b"]).await;
    child.lineage.parent = base.name();
    let child = store.commit_version(child).await.unwrap();
    assert_eq!(reason(store.delete_version(&base.name()).await), Reason::ResourceInUse);
    let mut other = new_version(&store, "other", &["c"]).await;
    other.lineage.parent = child.name();
    store.commit_version(other).await.unwrap();
    assert_eq!(reason(store.delete_model("m", None).await), Reason::ResourceInUse);
    store.delete_model("other", None).await.unwrap();

    let running = enqueue(&store, &child.name()).await;
    assert_eq!(reason(store.delete_version(&child.name()).await), Reason::ResourceInUse);
    assert_eq!(reason(store.delete_model("m", None).await), Reason::ResourceInUse);
    assert_eq!(reason(store.delete_operation(&running.id).await), Reason::ResourceInUse);
    store.request_cancel(&running.id).await.unwrap();
    store.delete_operation(&running.id).await.unwrap();
    assert_eq!(reason(store.operation(&running.id).await), Reason::ResourceNotFound);
    store.delete_version(&child.name()).await.unwrap();
    store.delete_version(&base.name()).await.unwrap();
    // A model whose name begins alike is another model.
    version(&store, "m-2", &["d"]).await;
    enqueue(&store, "models/m-2").await;
    store.delete_model("m", None).await.unwrap();
}

#[tokio::test]
async fn request_ids_and_the_queue_limit_hold() {
    let (_folder, store) = open().await;
    let new = operation("models/m", "r-1");
    let first = store.enqueue(&new, &[], 2).await.unwrap();
    let resolved_later = NewOperation { request: b"other version".to_vec(), ..new.clone() };
    assert_eq!(store.enqueue(&resolved_later, &[], 2).await.unwrap(), first);
    let different = NewOperation { fingerprint: b"different".to_vec(), ..new.clone() };
    assert_eq!(reason(store.enqueue(&different, &[], 2).await), Reason::RequestIdReused);
    let other_kind = NewOperation { kind: Kind::Evaluate, ..different };
    store.enqueue(&other_kind, &[], 2).await.unwrap();
    assert_eq!(
        reason(store.enqueue(&operation("models/m", ""), &[], 2).await),
        Reason::LimitReached
    );
    // The same request still has its answer.
    assert_eq!(store.enqueue(&new, &[], 2).await.unwrap().id, first.id);
    let found = store.operation_by_request(Kind::Recipe, "r-1", b"as sent").await.unwrap();
    assert_eq!(found.unwrap().id, first.id);
    assert_eq!(store.operation_by_request(Kind::Recipe, "", b"").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_two_claims_get_the_same_operation() {
    let (_folder, store) = open().await;
    let store = std::sync::Arc::new(store);
    let mut queued = Vec::new();
    for _ in 0..20 {
        queued.push(enqueue(&store, "models/m").await.id);
    }
    let claimers: Vec<_> = (0..4)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut mine = Vec::new();
                while let Some(operation) = store.claim().await.unwrap() {
                    assert_eq!((operation.state, operation.attempt), (State::Running, 1));
                    mine.push(operation.id);
                }
                mine
            })
        })
        .collect();
    let mut claimed = Vec::new();
    for claimer in claimers {
        claimed.extend(claimer.await.unwrap());
    }
    claimed.sort();
    queued.sort();
    assert_eq!(claimed, queued);
}

#[tokio::test]
async fn an_operation_lives_from_claim_to_end() {
    let (_folder, store) = open().await;
    let first = enqueue(&store, "models/m").await;
    enqueue(&store, "models/m").await;
    let run = store.claim().await.unwrap().unwrap();
    assert_eq!(run.id, first.id, "first come, first served");
    let none = Metrics::new();
    let loss = Metrics::from([("loss".to_owned(), 2.5), ("step".to_owned(), 3.0)]);
    assert!(!store.report_progress(&run.id, 1, 0.25, "quarter", &loss).await.unwrap());
    assert_eq!(store.operation(&run.id).await.unwrap().metrics, loss);
    assert_eq!(store.events(&run.id, 0).await.unwrap().last().unwrap().metrics, loss);
    assert!(!store.report_progress(&run.id, 1, f64::NAN, "strange", &none).await.unwrap());
    assert_eq!(store.operation(&run.id).await.unwrap().metrics, none);
    assert!(store.report_progress(&run.id, 2, 0.5, "not mine", &none).await.unwrap());
    store.save_result(&run.id, "before", b"x").await.unwrap();
    assert_eq!(store.saved_result(&run.id, "before").await.unwrap().unwrap(), b"x");
    assert_eq!(store.request_cancel(&run.id).await.unwrap(), State::Running);
    assert!(store.report_progress(&run.id, 1, 0.5, "half", &none).await.unwrap());
    store.end(&run.id, 2, &End::Succeeded(b"late".to_vec())).await.unwrap();
    assert_eq!(store.operation(&run.id).await.unwrap().state, State::Running);

    let error = Error::option("share", "2 is outside [0, 1)").within("recipe.steps[0].wanda");
    store.end(&run.id, 1, &End::Failed((&error).into())).await.unwrap();
    let ended = store.operation(&run.id).await.unwrap();
    let stored = ended.error.clone().unwrap();
    assert_eq!((ended.state, stored.reason()), (State::Failed, Reason::InvalidOption));
    assert_eq!(stored.violations[0].0, "recipe.steps[0].wanda.share");
    assert!(ended.ended_ms >= ended.started_ms);
    assert_eq!(store.request_cancel(&run.id).await.unwrap(), State::Failed);
    // Of an operation that failed, what it had is all there is.
    let kept = store.saved_results(&run.id).await.unwrap();
    assert_eq!(kept.into_iter().collect::<Vec<_>>(), [("before".to_owned(), b"x".to_vec())]);
    let events = store.events(&run.id, 0).await.unwrap();
    let messages: Vec<_> = events.iter().map(|e| e.message.as_str()).collect();
    assert_eq!(
        messages,
        ["waiting for a runner", "started", "quarter", "strange", "half", error.message()]
    );
    assert!(events.iter().map(|e| e.sequence).eq(1..=6));
    assert_eq!(store.events(&run.id, 5).await.unwrap().len(), 1);
}

#[tokio::test]
async fn operations_of_a_dead_process_are_taken_up_again() {
    let (_folder, store) = open().await;
    let id = enqueue(&store, "models/m").await.id;
    for attempt in 1..=5 {
        assert_eq!(store.claim().await.unwrap().unwrap().attempt, attempt);
        store.recover_operations().await.unwrap();
    }
    let failed = store.operation(&id).await.unwrap();
    assert_eq!(failed.state, State::Failed);
    assert!(failed.message.contains("ended 5 times"));

    // A graceful stop is no crash.
    let id = enqueue(&store, "models/m").await.id;
    for attempt in 1..=9 {
        assert_eq!(store.claim().await.unwrap().unwrap().attempt, attempt);
        store.end(&id, attempt, &End::Interrupted).await.unwrap();
    }
    store.claim().await.unwrap();
    store.request_cancel(&id).await.unwrap();
    store.recover_operations().await.unwrap();
    assert_eq!(store.operation(&id).await.unwrap().state, State::Cancelled);
}

#[tokio::test]
async fn events_are_bounded() {
    let (_folder, store) = open().await;
    let id = enqueue(&store, "models/m").await.id;
    store.claim().await.unwrap();
    let query = "UPDATE operations SET sequence = 5000";
    let mut tx = store.sql.write().await.unwrap();
    sqlx::query(query).execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    store.report_progress(&id, 1, 0.1, "on", &Metrics::new()).await.unwrap();
    let events = store.events(&id, 0).await.unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].sequence, 5001);
}

#[tokio::test]
async fn a_folder_of_the_first_release_is_brought_up_to_date_with_all_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("planish.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(&file)
        .create_if_missing(true)
        .foreign_keys(true);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let all = sqlx::migrate!();
    let first = all.iter().take(1).cloned().collect::<Vec<_>>();
    sqlx::migrate::Migrator::with_migrations(first).run(&pool).await.unwrap();
    for statement in [
        "INSERT INTO objects VALUES ('sha256:o', 3)",
        "INSERT INTO datasets VALUES ('text', 'a text', 'sha256:o', 'a.txt', 1, 5, 'e', 'upload', '')",
        "INSERT INTO operations (id, kind, state, target, request, request_id, fingerprint, created_ms, \
         sequence) VALUES ('op', 'recipe', 'failed', 'models/m', x'01', 'once', x'02', 7, 2)",
        "INSERT INTO operation_events VALUES ('op', 1, 8, 0.5, 'half'), ('op', 2, 9, 0.5, 'failed')",
        "INSERT INTO operation_uses VALUES ('op', 'models/m')",
        "INSERT INTO operation_results VALUES ('op', 'before', x'03')",
    ] {
        sqlx::query(statement).execute(&pool).await.unwrap();
    }
    pool.close().await;

    let store = Store::open(folder.path()).await.unwrap();
    let operation = store.operation("op").await.unwrap();
    assert_eq!((operation.kind, operation.state), (Kind::Recipe, State::Failed));
    assert_eq!((operation.sequence, operation.request), (2, vec![1]));
    assert_eq!(store.events("op", 0).await.unwrap().len(), 2);
    assert_eq!(store.saved_result("op", "before").await.unwrap(), Some(vec![3]));
    assert_eq!(store.dataset("text").await.unwrap().kind, DatasetKind::Text);
    let known = store.operation_by_request(Kind::Recipe, "once", &[2]).await.unwrap();
    assert_eq!(known.unwrap().id, "op");
    // What refers to an operation still goes with it.
    store.delete_operation("op").await.unwrap();
    assert!(store.events("op", 0).await.unwrap().is_empty());
    assert!(store.saved_results("op").await.unwrap().is_empty());
}
