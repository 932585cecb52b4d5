-- Numbers that work measures on the way, such as a loss: a JSON object by name.
ALTER TABLE operations ADD COLUMN metrics TEXT NOT NULL DEFAULT '{}';
ALTER TABLE operation_events ADD COLUMN metrics TEXT NOT NULL DEFAULT '{}';

-- The columns of a view are settled when it is made.
DROP VIEW operation_rows;
CREATE VIEW operation_rows AS
SELECT p.*,
       (SELECT json_group_array('models/' || v.model || '/versions/' || v.version ORDER BY v.step)
        FROM versions v
        WHERE v.operation = 'operations/' || p.id AND v.operation <> '') AS versions
FROM operations p;
