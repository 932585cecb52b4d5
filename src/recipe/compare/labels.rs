//! Where labels go in a chart: near their markers, off each other and off everything else.

/// Distances of a label from its marker that are tried, in pixels.
const GAPS: [f64; 8] = [2.0, 7.0, 14.0, 24.0, 36.0, 50.0, 68.0, 90.0];
/// From this distance on a line leads from the marker to its label, in pixels.
const LEADER_GAP: f64 = 7.0;
/// Directions that are tried, evenly round the marker, the first to the right, clockwise.
const DIRECTIONS: usize = 16;
/// What a label at each eighth of the circle costs: right is best, as one reads on from the marker.
const DIRECTION_COST: [f64; 8] = [0.0, 2.0, 3.0, 3.5, 2.5, 2.5, 2.0, 1.0];
/// The cost of what must not be; more than all that is merely unpleasant.
const FORBIDDEN: f64 = 1e6;
/// Markers nearer than this overlap or nearly so, in pixels.
const KNOT: f64 = 16.0;
const MOST_ROUNDS: usize = 40;

pub type At = (f64, f64);
/// A straight line between two places.
pub type Line = (At, At);

/// A rectangle in pixels, y downwards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rect {
    pub x: f64,
    pub y: f64,
    pub w: f64,
    pub h: f64,
}

impl Rect {
    /// The square of half side `radius` about `at`.
    pub fn around(at: At, radius: f64) -> Self {
        Self { x: at.0 - radius, y: at.1 - radius, w: 2.0 * radius, h: 2.0 * radius }
    }

    pub fn right(&self) -> f64 {
        self.x + self.w
    }

    pub fn bottom(&self) -> f64 {
        self.y + self.h
    }

    /// Larger by `by` pixels on every side.
    pub fn grown(&self, by: f64) -> Self {
        Self { x: self.x - by, y: self.y - by, w: self.w + 2.0 * by, h: self.h + 2.0 * by }
    }

    /// Whether the two share more than an edge.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.x < other.right()
            && other.x < self.right()
            && self.y < other.bottom()
            && other.y < self.bottom()
    }

    /// Whether `other` lies within.
    #[cfg(test)]
    pub fn contains(&self, other: &Self) -> bool {
        self.x <= other.x
            && self.y <= other.y
            && other.right() <= self.right()
            && other.bottom() <= self.bottom()
    }

    /// Moved into `frame` as far as it fits.
    fn within(mut self, frame: &Self) -> Self {
        self.x = self.x.min(frame.right() - self.w).max(frame.x);
        self.y = self.y.min(frame.bottom() - self.h).max(frame.y);
        self
    }

    /// The place in the rectangle nearest to `at`.
    fn nearest(&self, at: At) -> At {
        (at.0.max(self.x).min(self.right()), at.1.max(self.y).min(self.bottom()))
    }

    /// Whether a line passes through the inside.
    fn crossed_by(&self, line: &Line) -> bool {
        let ((x, y), (to_x, to_y)) = *line;
        let (dx, dy) = (to_x - x, to_y - y);
        // The part of the line that is on the inner side of each edge in turn (Liang and Barsky).
        let (mut enter, mut leave) = (0f64, 1f64);
        let edges =
            [(-dx, x - self.x), (dx, self.right() - x), (-dy, y - self.y), (dy, self.bottom() - y)];
        for (towards, room) in edges {
            if towards == 0.0 {
                if room <= 0.0 {
                    return false;
                }
            } else if towards < 0.0 {
                enter = enter.max(room / towards);
            } else {
                leave = leave.min(room / towards);
            }
        }
        enter < leave
    }
}

/// A marker and the size of its label, in pixels; `None` when it has no label.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mark {
    pub at: At,
    pub radius: f64,
    pub label: Option<(f64, f64)>,
}

/// Where a label goes, and the line that leads to it when it is far from its marker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    pub label: Rect,
    pub leader: Option<Line>,
}

/// A [`Place`] and what it costs by itself.
struct Candidate {
    place: Place,
    cost: f64,
}

/// Places for the labels of `marks` inside `frame`, and whether they are clear of one another, of
/// all markers, and of the lines that lead to them. Labels avoid `lines` where they can.
///
/// The same input gives the same places: from each of a few fixed orders, labels move in turn to
/// where they cost least, until none moves; the cheapest outcome counts.
pub fn place(marks: &[Mark], lines: &[Line], frame: Rect) -> (Vec<Option<Place>>, bool) {
    let candidates: Vec<Vec<Candidate>> =
        (0..marks.len()).map(|i| candidates(marks, i, lines, frame)).collect();
    let labelled: Vec<usize> = (0..marks.len()).filter(|&i| marks[i].label.is_some()).collect();
    let mut by_x = labelled.clone();
    by_x.sort_by(|&a, &b| marks[a].at.0.total_cmp(&marks[b].at.0));
    // The labels with the fewest good places first.
    let mut by_need = labelled.clone();
    by_need.sort_by_key(|&i| candidates[i].iter().filter(|c| c.cost < 30.0).count());
    let reverse = by_x.iter().rev().copied().collect();

    let mut best: Option<(f64, Vec<usize>)> = None;
    for order in [by_need, by_x, reverse, labelled] {
        let (cost, chosen) = settle(&candidates, &order);
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, chosen));
        }
    }
    let (cost, chosen) = best.unwrap_or_default();
    let places = candidates.iter().zip(chosen).map(|(of, k)| of.get(k).map(|c| c.place)).collect();
    (places, cost < FORBIDDEN)
}

/// The places to try for the label of mark `own`, none when it has no label.
fn candidates(marks: &[Mark], own: usize, lines: &[Line], frame: Rect) -> Vec<Candidate> {
    let Mark { at, radius, label: Some((w, h)) } = marks[own] else {
        return Vec::new();
    };
    let mut found = Vec::with_capacity(GAPS.len() * DIRECTIONS);
    for gap in GAPS {
        for direction in 0..DIRECTIONS {
            let (sin, cos) =
                (std::f64::consts::TAU * direction as f64 / DIRECTIONS as f64).sin_cos();
            let most = sin.abs().max(cos.abs());
            // The label's edge nearest to the marker is `gap` from it; corners only at diagonals.
            let middle = (
                at.0 + (radius + gap) * cos + w / 2.0 * cos / most,
                at.1 + (radius + gap) * sin + h / 2.0 * sin / most,
            );
            let label = Rect { x: middle.0 - w / 2.0, y: middle.1 - h / 2.0, w, h }.within(&frame);
            let leader = (gap >= LEADER_GAP).then(|| {
                let end = label.nearest(at);
                let (dx, dy) = (end.0 - at.0, end.1 - at.1);
                let part = (radius / dx.hypot(dy)).min(1.0);
                ((at.0 + dx * part, at.1 + dy * part), end)
            });
            let eighth = direction / 2;
            let aside = DIRECTION_COST[eighth].max(DIRECTION_COST[direction.div_ceil(2) % 8]);
            let mut cost = gap + aside + if leader.is_some() { 8.0 } else { 0.0 };
            for (i, mark) in marks.iter().enumerate() {
                let body = Rect::around(mark.at, mark.radius + 1.0);
                if label.overlaps(&body) {
                    cost += FORBIDDEN;
                } else if i != own {
                    // Near to another marker, it reads as that one's label.
                    let near = label.overlaps(&body.grown(4.0));
                    cost += if near { 9.0 } else { 0.0 };
                    if leader.is_some_and(|leader| body.crossed_by(&leader)) {
                        let apart = (mark.at.0 - at.0).hypot(mark.at.1 - at.1);
                        // In a knot of markers a leader has to pass over some.
                        cost += if apart > KNOT { FORBIDDEN } else { 60.0 };
                    }
                }
            }
            cost += 25.0 * lines.iter().filter(|line| label.crossed_by(line)).count() as f64;
            found.push(Candidate { place: Place { label, leader }, cost });
        }
    }
    found
}

/// What two labels cost each other.
fn conflict(a: &Place, b: &Place) -> f64 {
    let through = |place: &Place, leader: Option<Line>| {
        leader.is_some_and(|leader| place.label.grown(1.0).crossed_by(&leader))
    };
    let crossing = match (a.leader, b.leader) {
        (Some(a), Some(b)) => crossing(&a, &b),
        _ => false,
    };
    let mut cost = if crossing { 60.0 } else { 0.0 };
    if a.label.grown(1.0).overlaps(&b.label) || through(a, b.leader) || through(b, a.leader) {
        cost += FORBIDDEN;
    }
    cost
}

/// Whether two lines cross, other than by touching.
fn crossing(a: &Line, b: &Line) -> bool {
    let side = |line: &Line, at: At| {
        let ((x, y), (to_x, to_y)) = *line;
        (to_x - x) * (at.1 - y) - (to_y - y) * (at.0 - x)
    };
    side(a, b.0) * side(a, b.1) < 0.0 && side(b, a.0) * side(b, a.1) < 0.0
}

/// Moves labels in `order` to their cheapest places until none moves. Gives the cost of all and the
/// candidate of each mark.
fn settle(candidates: &[Vec<Candidate>], order: &[usize]) -> (f64, Vec<usize>) {
    let mut chosen: Vec<Option<usize>> = vec![None; candidates.len()];
    // The cost of a candidate among the labels placed so far.
    let cost = |chosen: &[Option<usize>], i: usize, k: usize| {
        let candidate = &candidates[i][k];
        let others = order.iter().filter(|&&j| j != i).filter_map(|&j| Some((j, chosen[j]?)));
        let conflicts = others.map(|(j, k)| conflict(&candidate.place, &candidates[j][k].place));
        candidate.cost + conflicts.sum::<f64>()
    };
    for _ in 0..MOST_ROUNDS {
        let mut moved = false;
        for &i in order {
            let least = (0..candidates[i].len())
                .map(|k| (cost(&chosen, i, k), k))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .map(|(_, k)| k);
            moved |= least != chosen[i];
            chosen[i] = least;
        }
        if !moved {
            break;
        }
    }
    let chosen: Vec<usize> = chosen.into_iter().map(Option::unwrap_or_default).collect();
    let some: Vec<Option<usize>> = chosen.iter().copied().map(Some).collect();
    // Conflicts count for both labels; only their order of size matters here.
    (order.iter().map(|&i| cost(&some, i, chosen[i])).sum(), chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Rect = Rect { x: 0.0, y: 0.0, w: 700.0, h: 420.0 };

    fn marks(places: &[At]) -> Vec<Mark> {
        places.iter().map(|&at| Mark { at, radius: 5.0, label: Some((70.0, 13.0)) }).collect()
    }

    fn assert_clear(marks: &[Mark], frame: Rect) {
        let (places, clear) = place(marks, &[], frame);
        assert!(clear);
        let places: Vec<Place> = places.into_iter().flatten().collect();
        assert_eq!(places.len(), marks.len());
        for (i, a) in places.iter().enumerate() {
            assert!(frame.contains(&a.label), "label {i} leaves the frame");
            for mark in marks {
                assert!(!a.label.overlaps(&Rect::around(mark.at, mark.radius)), "label {i}");
            }
            for (j, b) in places.iter().enumerate().skip(i + 1) {
                assert!(!a.label.overlaps(&b.label), "labels {i} and {j}");
            }
        }
    }

    #[test]
    fn a_lone_label_stands_to_the_right_without_a_leader() {
        let (places, clear) = place(&marks(&[(100.0, 100.0)]), &[], FRAME);
        let place = places[0].expect("placed");
        assert!(clear && place.leader.is_none());
        assert!(place.label.x > 105.0 && place.label.y < 100.0 && place.label.bottom() > 100.0);
    }

    #[test]
    fn labels_stay_inside_the_frame_at_its_corners() {
        assert_clear(&marks(&[(5.0, 5.0), (695.0, 5.0), (5.0, 415.0), (695.0, 415.0)]), FRAME);
    }

    #[test]
    fn thirteen_labels_of_a_cluster_do_not_overlap() {
        let cluster: Vec<At> = (0..13)
            .map(|i| (350.0 + f64::from(i * 17 % 29), 200.0 + f64::from(i * 11 % 23)))
            .collect();
        assert_clear(&marks(&cluster), FRAME);
    }

    #[test]
    fn labels_of_equal_points_do_not_overlap() {
        assert_clear(&marks(&[(690.0, 210.0); 3]), FRAME);
    }

    #[test]
    fn labels_avoid_lines() {
        let line = ((0.0, 100.0), (700.0, 100.0));
        let (places, _) = place(&marks(&[(350.0, 100.0)]), &[line], FRAME);
        assert!(!places[0].expect("placed").label.crossed_by(&line));
    }

    #[test]
    fn what_cannot_be_clear_is_said_to_be_so() {
        let (places, clear) =
            place(&marks(&[(50.0, 20.0); 20]), &[], Rect { x: 0.0, y: 0.0, w: 100.0, h: 40.0 });
        assert!(!clear && places.iter().all(Option::is_some));
        assert_eq!(place(&[], &[], FRAME), (vec![], true));
    }

    #[test]
    fn marks_without_a_label_get_no_place_but_are_avoided() {
        let mut all = marks(&[(100.0, 100.0), (112.0, 100.0)]);
        all[1].label = None;
        let (places, clear) = place(&all, &[], FRAME);
        assert!(clear && places[1].is_none());
        let label = places[0].expect("placed").label;
        assert!(!label.overlaps(&Rect::around((112.0, 100.0), 5.0)));
    }

    #[test]
    fn lines_cross_rectangles_and_each_other_where_they_should() {
        let rect = Rect { x: 0.0, y: 0.0, w: 10.0, h: 10.0 };
        assert!(rect.crossed_by(&((-5.0, 5.0), (15.0, 6.0))));
        assert!(rect.crossed_by(&((2.0, 2.0), (3.0, 3.0))));
        assert!(!rect.crossed_by(&((-5.0, 5.0), (-1.0, 5.0))));
        assert!(!rect.crossed_by(&((0.0, -5.0), (0.0, 15.0))));
        assert!(!rect.crossed_by(&((-4.0, 8.0), (4.0, 14.1))));
        assert!(crossing(&((0.0, 0.0), (2.0, 2.0)), &((0.0, 2.0), (2.0, 0.0))));
        assert!(!crossing(&((0.0, 0.0), (2.0, 2.0)), &((2.0, 2.0), (3.0, 0.0))));
    }
}
