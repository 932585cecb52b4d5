use super::*;

fn settings() -> Settings {
    Settings {
        lengths: vec![64, 150],
        gammas: vec![0.5, 1.0],
        dim: 3,
        heads: 2,
        causal: false,
        eps: 1e-3,
        repetitions: 2,
    }
}

#[test]
fn larger_entries_take_higher_degrees_and_errors_are_kept() {
    for causal in [false, true] {
        let mut seen = 0;
        let rows = measure(&Settings { causal, ..settings() }, |_| {
            seen += 1;
            Ok::<_, Error>(())
        })
        .unwrap();
        assert_eq!((rows.len(), seen), (4, 4));
        for pair in rows.chunks(2) {
            let [small, large] = [&pair[0], &pair[1]];
            assert_eq!(small.length, large.length);
            let (small, large) = (small.factored.as_ref(), large.factored.as_ref());
            let (small, large) = (small.unwrap(), large.unwrap());
            assert!(small.degree < large.degree && small.features < large.features);
            assert!(small.error <= 1e-3 && large.error <= 1e-3);
            assert_eq!(small.speedup.values.len(), 2);
            assert_eq!(count(3, small.degree), Some(small.features));
        }
    }
}

fn row(length: usize, gamma: f64, speedup: Option<f64>) -> Row {
    let spread = |v: f64| Spread::of(vec![v]);
    let factored = speedup.map(|speedup| Factored {
        degree: 1,
        features: 1,
        error: 0.0,
        milliseconds: spread(1.0),
        speedup: spread(speedup),
        speedup_with_forward: spread(speedup),
    });
    let exact_milliseconds = spread(1.0);
    Row { length, gamma, threshold: threshold(length), factored, exact_milliseconds }
}

#[test]
fn crossings_lie_between_rows() {
    let rows = [
        row(64, 0.5, Some(4.0)),
        row(64, 1.0, Some(0.25)),
        row(9, 0.5, Some(0.5)),
        row(9, 1.0, None),
        row(99, 1.0, Some(2.0)),
        row(99, 2.0, None),
    ];
    let found = crossings(&rows);
    assert_eq!(found.iter().map(|c| c.length).collect::<Vec<_>>(), [9, 64, 99]);
    assert_eq!(found[0].gamma, None);
    assert!((found[1].gamma.unwrap() - 0.75).abs() < 1e-12);
    assert!(found[2].gamma.unwrap() > 1.0 && found[2].gamma.unwrap() < 1.2);
}

#[test]
fn both_ways_learn_the_same() {
    let training = Training {
        length: 1536,
        steps: 4,
        dim: 2,
        heads: 2,
        layers: 1,
        size: 0.5,
        rank: 2,
        rate: 1e-2,
        eps: 1e-3,
        seeds: vec![1],
    };
    let found = train(training.clone()).unwrap();
    let pair = &found.pairs[0];
    assert_eq!((pair.exact.factored_share, pair.factored.factored_share), (0.0, 1.0));
    assert!(pair.factored.features > 1);
    assert!(pair.loss_difference < 1e-2, "{}", pair.loss_difference);
    assert!(pair.exact.losses[3] < pair.exact.losses[0]);
    assert_eq!(pair.exact.losses.len(), 4);
    for bad in [
        Training { length: 1, ..training.clone() },
        Training { dim: 3, ..training.clone() },
        Training { eps: 0.0, ..training.clone() },
        Training { rate: f64::NAN, ..training.clone() },
        Training { seeds: Vec::new(), ..training.clone() },
        Training { rank: 0, ..training },
    ] {
        assert!(train(bad.clone()).is_err(), "{bad:?}");
    }
}

#[test]
fn what_measures_nothing_is_refused() {
    let refused = |settings: Settings| measure(&settings, |_| Ok::<_, Error>(())).is_err();
    assert!(refused(Settings { lengths: vec![1], ..settings() }));
    assert!(refused(Settings { lengths: vec![], ..settings() }));
    assert!(refused(Settings { gammas: vec![0.0], ..settings() }));
    assert!(refused(Settings { gammas: vec![f64::NAN], ..settings() }));
    assert!(refused(Settings { dim: 0, ..settings() }));
    assert!(refused(Settings { eps: 2.0, ..settings() }));
    assert!(refused(Settings { repetitions: 0, ..settings() }));
}
