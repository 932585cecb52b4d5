-- How an adapter was trained, as JSON; none of an imported one.
ALTER TABLE adapters ADD COLUMN lineage TEXT;

-- A view keeps the columns of the day it was made.
DROP VIEW adapter_rows;
CREATE VIEW adapter_rows AS
SELECT a.*,
       (SELECT json_group_array(json_array(f.file_name, f.digest, o.size) ORDER BY f.file_name)
        FROM adapter_files f JOIN objects o USING (digest)
        WHERE f.adapter = a.id) AS files
FROM adapters a;
