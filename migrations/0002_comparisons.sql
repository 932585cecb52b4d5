-- Comparisons and claims are operations too. The kinds are the program's to check: a list of them in a
-- constraint would have to be rewritten, with the whole table, for each new one.
CREATE TABLE new_operations (
    id               TEXT NOT NULL PRIMARY KEY,
    kind             TEXT NOT NULL,
    state            TEXT NOT NULL
                     CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    target           TEXT NOT NULL,
    request          BLOB NOT NULL,
    request_id       TEXT NOT NULL,
    fingerprint      BLOB NOT NULL,
    progress         REAL NOT NULL DEFAULT 0,
    message          TEXT NOT NULL DEFAULT '',
    created_ms       INTEGER NOT NULL,
    started_ms       INTEGER,
    ended_ms         INTEGER,
    attempt          INTEGER NOT NULL DEFAULT 0,
    crashes          INTEGER NOT NULL DEFAULT 0,
    sequence         INTEGER NOT NULL DEFAULT 0,
    response         BLOB,
    error            TEXT,
    cancel_requested INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO new_operations
SELECT id, kind, state, target, request, request_id, fingerprint, progress, message, created_ms,
       started_ms, ended_ms, attempt, crashes, sequence, response, error, cancel_requested
FROM operations;

-- What refers to operations must let go of the old table: dropping that would delete it too.
CREATE TABLE kept_events AS SELECT * FROM operation_events;
CREATE TABLE kept_uses AS SELECT * FROM operation_uses;
CREATE TABLE kept_results AS SELECT * FROM operation_results;
DROP VIEW needed;
DROP VIEW unused_objects;
DROP VIEW operation_rows;
DROP TABLE operation_events;
DROP TABLE operation_uses;
DROP TABLE operation_results;
DROP TABLE operations;
ALTER TABLE new_operations RENAME TO operations;
CREATE UNIQUE INDEX operations_request ON operations (kind, request_id) WHERE request_id <> '';
CREATE INDEX operations_state ON operations (state, created_ms);
CREATE INDEX operations_created ON operations (created_ms DESC, id DESC);

CREATE TABLE operation_events (
    operation TEXT NOT NULL REFERENCES operations ON DELETE CASCADE,
    sequence  INTEGER NOT NULL,
    time_ms   INTEGER NOT NULL,
    progress  REAL NOT NULL,
    message   TEXT NOT NULL,
    PRIMARY KEY (operation, sequence)
) STRICT, WITHOUT ROWID;
INSERT INTO operation_events SELECT * FROM kept_events;
DROP TABLE kept_events;

-- Resource names and object digests that an operation needs until it ends.
CREATE TABLE operation_uses (
    operation TEXT NOT NULL REFERENCES operations ON DELETE CASCADE,
    resource  TEXT NOT NULL,
    PRIMARY KEY (operation, resource)
) STRICT, WITHOUT ROWID;
CREATE INDEX operation_uses_resource ON operation_uses (resource);
INSERT INTO operation_uses SELECT * FROM kept_uses;
DROP TABLE kept_uses;

-- Intermediate results: a resumed operation need not compute them again, and of one that was cancelled
-- or failed they are what there is.
CREATE TABLE operation_results (
    operation TEXT NOT NULL REFERENCES operations ON DELETE CASCADE,
    name      TEXT NOT NULL,
    value     BLOB NOT NULL,
    PRIMARY KEY (operation, name)
) STRICT, WITHOUT ROWID;
INSERT INTO operation_results SELECT * FROM kept_results;
DROP TABLE kept_results;

CREATE VIEW operation_rows AS
SELECT p.*,
       (SELECT json_group_array('models/' || v.model || '/versions/' || v.version ORDER BY v.step)
        FROM versions v
        WHERE v.operation = 'operations/' || p.id AND v.operation <> '') AS versions
FROM operations p;

CREATE VIEW needed AS
SELECT u.resource, 'operations/' || u.operation AS operation
FROM operation_uses u JOIN operations p ON p.id = u.operation
WHERE p.state IN ('queued', 'running');

CREATE VIEW unused_objects AS
SELECT o.digest FROM objects o
WHERE NOT EXISTS (SELECT 1 FROM version_files f WHERE f.digest = o.digest)
  AND NOT EXISTS (SELECT 1 FROM datasets d WHERE d.digest = o.digest)
  AND NOT EXISTS (SELECT 1 FROM needed n WHERE n.resource = o.digest);

-- What the records of a data set are: `text` or `choices`.
ALTER TABLE datasets ADD COLUMN kind TEXT NOT NULL DEFAULT 'text';
DROP VIEW dataset_rows;
CREATE VIEW dataset_rows AS
SELECT d.*, o.size FROM datasets d JOIN objects o USING (digest);
