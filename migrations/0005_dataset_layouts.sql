-- How the records of a data set are read: as asked, and as found in the file (JSON); and how many
-- records were left out.
ALTER TABLE datasets ADD COLUMN asked TEXT NOT NULL DEFAULT '{}';
ALTER TABLE datasets ADD COLUMN layout TEXT NOT NULL DEFAULT '{}';
ALTER TABLE datasets ADD COLUMN skipped INTEGER NOT NULL DEFAULT 0;
DROP VIEW dataset_rows;
CREATE VIEW dataset_rows AS
SELECT d.*, o.size FROM datasets d JOIN objects o USING (digest);
