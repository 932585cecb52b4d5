-- Times are milliseconds since 1970. Structured values that are only ever read whole are JSON text.

-- Every object that is stored or about to be: the row comes before the bytes, and goes with them.
CREATE TABLE objects (
    digest TEXT NOT NULL PRIMARY KEY,
    size   INTEGER NOT NULL CHECK (size >= 0)
) STRICT;

-- One lease for each time an object was handed in and nothing refers to it yet. A lease keeps the
-- object from being collected; whoever creates the reference takes one away.
CREATE TABLE leases (
    id         INTEGER PRIMARY KEY,
    digest     TEXT NOT NULL REFERENCES objects ON DELETE CASCADE,
    expires_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX leases_digest ON leases (digest);

CREATE TABLE models (
    id           TEXT NOT NULL PRIMARY KEY,
    display_name TEXT NOT NULL,
    labels       TEXT NOT NULL DEFAULT '{}',
    created_ms   INTEGER NOT NULL,
    updated_ms   INTEGER NOT NULL,
    etag         TEXT NOT NULL,
    -- Numbers are never given twice, whatever is deleted.
    next_version INTEGER NOT NULL DEFAULT 1
) STRICT;

CREATE TABLE versions (
    model        TEXT NOT NULL REFERENCES models ON DELETE CASCADE,
    version      INTEGER NOT NULL,
    digest       TEXT NOT NULL,
    family       TEXT NOT NULL,
    architecture TEXT NOT NULL,
    config       TEXT NOT NULL,
    parameters   INTEGER NOT NULL,
    weight_bytes INTEGER NOT NULL,
    total_bytes  INTEGER NOT NULL,
    layout_bytes TEXT NOT NULL,
    lineage      TEXT NOT NULL,
    -- What lineage says, pulled out for the questions asked of it: the parent version, and the
    -- operation and step that made this one (resource names; empty where there is none).
    parent       TEXT NOT NULL,
    operation    TEXT NOT NULL,
    step         INTEGER NOT NULL,
    created_ms   INTEGER NOT NULL,
    PRIMARY KEY (model, version)
) STRICT;
CREATE UNIQUE INDEX versions_step ON versions (operation, step) WHERE operation <> '';
CREATE INDEX versions_parent ON versions (parent) WHERE parent <> '';

CREATE TABLE version_files (
    model     TEXT NOT NULL,
    version   INTEGER NOT NULL,
    file_name TEXT NOT NULL,
    digest    TEXT NOT NULL REFERENCES objects,
    PRIMARY KEY (model, version, file_name),
    FOREIGN KEY (model, version) REFERENCES versions ON DELETE CASCADE
) STRICT;
CREATE INDEX version_files_digest ON version_files (digest);

CREATE TABLE datasets (
    id           TEXT NOT NULL PRIMARY KEY,
    display_name TEXT NOT NULL,
    digest       TEXT NOT NULL REFERENCES objects,
    file_name    TEXT NOT NULL,
    records      INTEGER NOT NULL,
    created_ms   INTEGER NOT NULL,
    etag         TEXT NOT NULL,
    source       TEXT NOT NULL,
    request_id   TEXT NOT NULL
) STRICT;
CREATE INDEX datasets_digest ON datasets (digest);
CREATE UNIQUE INDEX datasets_request ON datasets (request_id) WHERE request_id <> '';

CREATE TABLE operations (
    id               TEXT NOT NULL PRIMARY KEY,
    kind             TEXT NOT NULL CHECK (kind IN ('import', 'recipe', 'evaluate')),
    state            TEXT NOT NULL
                     CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    target           TEXT NOT NULL,
    request          BLOB NOT NULL,
    request_id       TEXT NOT NULL,
    -- The request as the client sent it, before names were resolved; decides whether a request id
    -- stands for the same request.
    fingerprint      BLOB NOT NULL,
    progress         REAL NOT NULL DEFAULT 0,
    message          TEXT NOT NULL DEFAULT '',
    created_ms       INTEGER NOT NULL,
    started_ms       INTEGER,
    ended_ms         INTEGER,
    -- Times a runner took the operation; also tells a late write of an earlier run apart.
    attempt          INTEGER NOT NULL DEFAULT 0,
    -- Runs that ended with the process.
    crashes          INTEGER NOT NULL DEFAULT 0,
    sequence         INTEGER NOT NULL DEFAULT 0,
    response         BLOB,
    error            TEXT,
    cancel_requested INTEGER NOT NULL DEFAULT 0
) STRICT;
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

-- Resource names and object digests that an operation needs until it ends.
CREATE TABLE operation_uses (
    operation TEXT NOT NULL REFERENCES operations ON DELETE CASCADE,
    resource  TEXT NOT NULL,
    PRIMARY KEY (operation, resource)
) STRICT, WITHOUT ROWID;
CREATE INDEX operation_uses_resource ON operation_uses (resource);

-- Intermediate results that a resumed operation need not compute again.
CREATE TABLE operation_results (
    operation TEXT NOT NULL REFERENCES operations ON DELETE CASCADE,
    name      TEXT NOT NULL,
    value     BLOB NOT NULL,
    PRIMARY KEY (operation, name)
) STRICT, WITHOUT ROWID;

CREATE VIEW model_rows AS
SELECT m.*,
       (SELECT max(v.version) FROM versions v WHERE v.model = m.id) AS latest,
       (SELECT count(*) FROM versions v WHERE v.model = m.id) AS versions
FROM models m;

CREATE VIEW version_rows AS
SELECT v.*,
       (SELECT json_group_array(json_array(f.file_name, f.digest, o.size) ORDER BY f.file_name)
        FROM version_files f JOIN objects o USING (digest)
        WHERE f.model = v.model AND f.version = v.version) AS files
FROM versions v;

CREATE VIEW dataset_rows AS
SELECT d.*, o.size FROM datasets d JOIN objects o USING (digest);

CREATE VIEW operation_rows AS
SELECT p.*,
       (SELECT json_group_array('models/' || v.model || '/versions/' || v.version ORDER BY v.step)
        FROM versions v
        WHERE v.operation = 'operations/' || p.id AND v.operation <> '') AS versions
FROM operations p;

-- What unfinished operations need.
CREATE VIEW needed AS
SELECT u.resource, 'operations/' || u.operation AS operation
FROM operation_uses u JOIN operations p ON p.id = u.operation
WHERE p.state IN ('queued', 'running');

-- Objects that nothing refers to; leases are the caller's to check, since they need the time.
CREATE VIEW unused_objects AS
SELECT o.digest FROM objects o
WHERE NOT EXISTS (SELECT 1 FROM version_files f WHERE f.digest = o.digest)
  AND NOT EXISTS (SELECT 1 FROM datasets d WHERE d.digest = o.digest)
  AND NOT EXISTS (SELECT 1 FROM needed n WHERE n.resource = o.digest);
