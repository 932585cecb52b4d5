-- Adapters belong to a model, whose versions they serve; they go before it does.
CREATE TABLE adapters (
    id             TEXT NOT NULL PRIMARY KEY,
    display_name   TEXT NOT NULL,
    base_model     TEXT NOT NULL REFERENCES models,
    -- Resource name of the version it was checked against, which may be deleted since.
    base_version   TEXT NOT NULL,
    method         TEXT NOT NULL,
    digest         TEXT NOT NULL,
    -- Ranks, scales, targets, sizes: what the API says of the content.
    facts          TEXT NOT NULL,
    source         TEXT NOT NULL,
    created_ms     INTEGER NOT NULL,
    etag           TEXT NOT NULL,
    request_id     TEXT NOT NULL
) STRICT;
CREATE INDEX adapters_base ON adapters (base_model, id);
CREATE UNIQUE INDEX adapters_request ON adapters (request_id) WHERE request_id <> '';

CREATE TABLE adapter_files (
    adapter   TEXT NOT NULL REFERENCES adapters ON DELETE CASCADE,
    file_name TEXT NOT NULL,
    digest    TEXT NOT NULL REFERENCES objects,
    PRIMARY KEY (adapter, file_name)
) STRICT;
CREATE INDEX adapter_files_digest ON adapter_files (digest);

CREATE VIEW adapter_rows AS
SELECT a.*,
       (SELECT json_group_array(json_array(f.file_name, f.digest, o.size) ORDER BY f.file_name)
        FROM adapter_files f JOIN objects o USING (digest)
        WHERE f.adapter = a.id) AS files
FROM adapters a;

DROP VIEW unused_objects;
CREATE VIEW unused_objects AS
SELECT o.digest FROM objects o
WHERE NOT EXISTS (SELECT 1 FROM version_files f WHERE f.digest = o.digest)
  AND NOT EXISTS (SELECT 1 FROM adapter_files f WHERE f.digest = o.digest)
  AND NOT EXISTS (SELECT 1 FROM datasets d WHERE d.digest = o.digest)
  AND NOT EXISTS (SELECT 1 FROM needed n WHERE n.resource = o.digest);
